"""Every strategy of reward fine-tuning on digits, from the same model, for the same number of network evaluations.

The model is that of configs/digits/flow_matching.yaml; a strategy is its recipe in configs/digits/, which makes threes
of all classes. An evaluation is one sample through the network forwards, whether or not a gradient follows. The reward
is ``log p(three)`` by one classifier; held out is another one, of another kind, that was taught on the other half of
the digits; a third, that of ``genkit.eval``, gives accuracy and features. ``gain`` is how much of the way from the
base's mean held-out probability to 1 was gone, after 300 updates and at the end; ``diversity`` the distance between
samples of the same class label, relative to the base's; ``FD`` the Frechet distance from the real threes, to which the
base is nearest when it is asked for a three (the second row). A thousand samples a row, in as many steps as were
trained.

Bounds: after 300 updates every strategy has gone 80 % of the way; LeapAlign keeps half the base's diversity.

    python benchmarks/rewards_digits.py --check

Trains what is not below outputs/rewards_digits, the base first (about a minute); delete a folder there to have its
strategy trained anew.
"""

import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _common import report
from torch import Tensor
from tqdm import tqdm

from genkit import rewards
from genkit.data.digits import Digits
from genkit.eval.inputs import to_uint8
from genkit.eval.run import evaluate
from genkit.rng import ItemRNG
from genkit.training.build import build
from genkit.training.calls import counting
from genkit.training.config import load_config
from genkit.training.export import export
from genkit.training.parts.judge import diversity
from genkit.training.samples import draw
from genkit.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "outputs" / "rewards_digits"
BASE = FOLDER / "base" / "pipeline"
BUDGET = 96_000  # 300 updates of those that need most
UPDATES = 300
SAMPLES = 1000
WANTED = 3

# The recipe, and settings that differ.
STRATEGIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "DRaFT": ("draft", ()),
    "DRaFT-1": ("draft", ("objective.live_steps=1",)),
    "DRaFT-LV": ("draft_lv", ()),
    "AlignProp": ("align_prop", ()),
    "ReFL": ("refl", ()),
    "DRTune": ("drtune", ()),
    "LeapAlign": ("leapalign", ()),
}


def trainer_of(name: str, folder: Path) -> Trainer:
    """A strategy's run, of as many updates as it will be allowed."""
    recipe, overrides = STRATEGIES[name]
    own = [f"output_dir={folder}", f"model.pretrained={BASE}", f"max_train_steps={BUDGET}", "sampling.every=null"]
    config = load_config(
        ROOT / "configs" / "digits" / f"{recipe}.yaml", [*own, f"checkpointing_steps={BUDGET}", *overrides]
    )
    return Trainer(build(config), quiet=True)


@torch.no_grad()
def sampled(trainer: Trainer, labels: Tensor) -> Tensor:
    """Samples of the averaged student under ``labels``, in [-1, 1]."""
    steps = trainer.config.objective_config().num_inference_steps  # type: ignore[attr-defined]
    with trainer.averaged():
        return torch.cat(
            [
                draw(trainer.run, {"class_labels": labels[items]}, ItemRNG(1, items), steps, (1, 8, 8))
                for items in torch.arange(len(labels)).split(250)
            ]
        )


def probabilities(images: Tensor) -> dict[str, float]:
    """The mean probability of a three, by both networks of the reward."""
    pixels = ((images + 1) / 2).clamp(0, 1)
    return {
        name: rewards.make("digits", wanted=WANTED, network=name)(pixels).exp().mean().item()
        for name in ("trained", "held_out")
    }


def measured(images: Tensor, labels: Tensor) -> dict[str, float]:
    """What the table has of samples, but for what is relative to the base."""
    data = Digits()
    threes, wanted = data.images[data.labels == WANTED], torch.full((len(images),), WANTED)
    got = evaluate(
        (to_uint8(threes), torch.full((len(threes),), WANTED)),
        (to_uint8(images), wanted),
        extractor="digits",
        metrics=("frechet", "accuracy"),
        quiet=True,
    ).values
    spread = diversity(((images + 1) / 2).clamp(0, 1), labels).mean().item()
    found = {"accuracy": got["class_accuracy"], "diversity": spread, "FD": got["frechet_distance"]}
    return probabilities(images) | found


def run(name: str) -> dict[str, Any]:
    """Train by a strategy, and measure: a row of the table. Reuses what is there."""
    torch.set_num_threads(1)
    folder = FOLDER / name
    done = folder / "row.json"
    if done.is_file():
        return json.loads(done.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    trainer, labels = trainer_of(name, folder), torch.arange(SAMPLES) % 10
    began, measuring, early = time.perf_counter(), 0.0, {}
    with counting(trainer.objective) as counts:
        for step in trainer.steps():
            if step == UPDATES:
                spent, paused = dict(counts), time.perf_counter()
                early = probabilities(sampled(trainer, labels))
                measuring = time.perf_counter() - paused
                counts.update(spent)  # type: ignore[attr-defined]
            if step >= UPDATES and counts["student"] >= BUDGET:
                break
    seconds = time.perf_counter() - began - measuring
    row = {"strategy": name, "updates": step, "evaluations": counts["student"], "seconds": seconds}
    row |= {"early": early["held_out"]} | measured(sampled(trainer, labels), labels)
    done.write_text(json.dumps(row, indent=2) + "\n")
    return row


def base() -> list[dict[str, Any]]:
    """The model that all start from, trained once: under all labels, and asked for threes."""
    if not BASE.is_dir():
        config = load_config(ROOT / "configs/digits/flow_matching.yaml", [f"output_dir={BASE.parent}", "resume=latest"])
        trainer = Trainer(build(config), quiet=True)
        trainer.train()
        export(trainer)
    trainer = trainer_of("DRaFT", FOLDER / "untrained")
    rows = []
    for name, labels in (("base", torch.arange(SAMPLES) % 10), ("base, asked", torch.full((SAMPLES,), WANTED))):
        found = measured(sampled(trainer, labels), labels)
        zeros = {"strategy": name, "updates": 0, "evaluations": 0, "seconds": 0.0, "early": found["held_out"]}
        rows.append(zeros | found)
    return rows


def main() -> None:
    rows = base()
    # A process a strategy, two at a time where there are cores for it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context, max_tasks_per_child=1) as pool:
        rows += tqdm(pool.map(run, STRATEGIES), total=len(STRATEGIES), unit="strategy", disable=None)
    start, spread = rows[0]["held_out"], rows[0]["diversity"]
    table = []
    for row in rows:
        gains = {
            f"gain@{UPDATES}": (row["early"] - start) / (1 - start),
            "gain": (row["held_out"] - start) / (1 - start),
        }
        kept = {k: row[k] for k in ("strategy", "updates", "evaluations", "seconds", "trained", "held_out")}
        table.append(kept | gains | {k: row[k] for k in ("accuracy", "FD")} | {"diversity": row["diversity"] / spread})
    bounds = {
        f"{r['strategy']}, what is missing of the gain after {UPDATES} updates": (1 - r[f"gain@{UPDATES}"], 0.2)
        for r in table[2:]
    }
    bounds["LeapAlign, diversity lost"] = (1 - table[-1]["diversity"], 0.5)
    report("rewards_digits", table, bounds)


if __name__ == "__main__":
    main()
