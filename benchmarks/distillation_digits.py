"""Every way to a one- or few-step student, from the same teacher on digits, for the same number of network evaluations.

The teacher is the model of configs/digits/flow_matching.yaml; a method is its recipe in configs/digits/, trained for as
many steps as the budget allows, its schedule stretched or shrunk to that. An evaluation is one sample through one
network forwards, whichever network that is and whether or not a gradient follows; one that takes a derivative as well
counts as two, and pairs that a method first has made count, too. 1,797 images a figure, with the classes of the real
ones, in 1, 2 and 4 steps of what the method samples its student with. Seconds are those of a process with one thread
beside whatever else ran; memory is what that process held at most, about 500 MiB of it libraries.

Bound: LSD, MeanFlow, SoFlow, rectified flow twice, DMD2 and APEX (released) have a one-step Frechet distance of at most
a quarter of that of the teacher in one step.

    python benchmarks/distillation_digits.py --check

Trains what is not below outputs/distillation_digits; delete a folder there to have its method trained anew.
"""

import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import report
from tqdm import tqdm

from genkit.data.digits import Digits
from genkit.eval.inputs import to_uint8
from genkit.eval.run import evaluate
from genkit.pipelines.pairs import make_pairs
from genkit.rng import ItemRNG
from genkit.training.build import build
from genkit.training.calls import counting
from genkit.training.config import TrainConfig, load_config
from genkit.training.export import export
from genkit.training.samples import draw
from genkit.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "outputs" / "distillation_digits"
TEACHER = FOLDER / "teacher" / "pipeline"
BUDGET = 600_000  # twice what the recipe of LSD spends
STEPS = (1, 2, 4)
QUARTER = ("LSD", "MeanFlow", "SoFlow", "rectified flow x2", "DMD2", "APEX")


@dataclass(frozen=True)
class Stage:
    """A training: its recipe, settings that differ, and its share of what is left of the budget."""

    recipe: str
    overrides: tuple[str, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Pairs:
    """Pairs of noise and what the model so far makes of it: how many, in how many steps."""

    num: int
    steps: int


METHODS: dict[str, tuple[Stage | Pairs, ...]] = {
    "LSD": (Stage("flow_map_lsd"),),
    "LSD from a teacher": (Stage("flow_map_lsd", (f"teacher={TEACHER}",)),),
    # At the rate of LSD, 2e-3, bursts of gradients leave its one-step Frechet distance at 30.7.
    "ESD": (Stage("flow_map_lsd", ("objective.loss=esd", "optimizer.lr=5e-4")),),
    "PSD-M": (Stage("flow_map_lsd", ("objective.loss=psd_m",)),),
    "PSD-U": (Stage("flow_map_lsd", ("objective.loss=psd_u",)),),
    "MeanFlow": (Stage("mean_flow"),),
    "iMF": (Stage("improved_mean_flow"),),
    "SoFlow": (Stage("so_flow"),),
    "sCM": (Stage("scm"),),
    # Straightened on pairs of the teacher, then distilled on pairs of the straightened flow, which needs fewer steps.
    "rectified flow x2": (
        Pairs(10_000, 16),
        Stage("rectified_flow", share=0.5),
        Pairs(10_000, 4),
        Stage("rectified_flow_distill"),
    ),
    "rectified diffusion": (Pairs(10_000, 16), Stage("rectified_diffusion")),
    "MDT-dist": (Stage("mdt"),),
    "APEX": (Stage("apex"),),
    "DMD2": (Stage("dmd2"),),
    "VSD": (Stage("vsd"),),
}


def settings(stage: Stage, folder: Path, model: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The recipe of a stage, from the weights of ``model``, with nothing but the last checkpoint kept."""
    recipe = ROOT / "configs" / "digits" / f"{stage.recipe}.yaml"
    own = [f"output_dir={folder}", f"model.pretrained={model}", "sampling.every=null", *stage.overrides, *overrides]
    if load_config(recipe).teacher is not None:
        own.append(f"teacher={TEACHER}")
    return load_config(recipe, own)


def cost(config: TrainConfig) -> float:
    """Evaluations a step, averaged over the first twenty."""
    with tempfile.TemporaryDirectory() as folder:
        probe = config.model_copy(update=dict(output_dir=Path(folder), max_train_steps=20, resume=None))
        trainer = Trainer(build(probe), quiet=True)
        with counting(trainer.objective) as counts:
            trainer.train()
    return sum(counts.values()) / 20


def run(name: str) -> dict[str, Any]:
    """Train by a method, and measure: a row of the table. Reuses what is there."""
    torch.set_num_threads(1)
    done = FOLDER / name.replace(" ", "_") / "row.json"
    if done.is_file():
        return json.loads(done.read_text())
    began, spent, steps, model = time.perf_counter(), 0.0, 0, TEACHER
    overrides: list[str] = []
    for k, stage in enumerate(METHODS[name]):
        folder = done.parent / str(k)
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(stage, Pairs):
            make_pairs(model, folder, num=stage.num, num_inference_steps=stage.steps, batch_size=256, quiet=True)
            spent += stage.num * stage.steps
            overrides = [f"data.path={folder}"]
            continue
        share = (BUDGET - spent) * stage.share
        config = settings(stage, folder, model, overrides)
        each = cost(config)
        count = int(share / each)
        warmup = min(config.lr_warmup_steps, count // 10)
        config = settings(stage, folder, model, [*overrides, f"max_train_steps={count}", f"lr_warmup_steps={warmup}"])
        trainer = Trainer(build(config), quiet=True)
        trainer.train()
        model = export(trainer)
        spent, steps = spent + count * each, steps + count
    row = {"method": name, "steps": steps, "evaluations": round(spent), "seconds": time.perf_counter() - began}
    row["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row |= measured(trainer)
    done.write_text(json.dumps(row, indent=2) + "\n")
    return row


def measured(trainer: Trainer) -> dict[str, Any]:
    """Frechet distance, class accuracy and recall of the averaged student, per number of steps that it knows."""
    labels = Digits().labels
    values: dict[str, Any] = {}
    times = trainer.objective.scheduler(trainer.run.pipe.scheduler).config.get("trained_times")
    known = len(times) if times else max(STEPS)
    with trainer.averaged():
        for n in STEPS:
            if n > known:
                values |= {f"{what}@{n}": "" for what in ("FD", "acc", "rec")}
                continue
            images = torch.cat(
                [
                    to_uint8(draw(trainer.run, {"class_labels": labels[items]}, ItemRNG(0, items), n, (1, 8, 8)))
                    for items in torch.arange(len(labels)).split(256)
                ]
            )
            got = evaluate("digits", (images, labels), metrics=("frechet", "prdc", "accuracy"), quiet=True).values
            values |= {f"FD@{n}": got["frechet_distance"], f"acc@{n}": got["class_accuracy"], f"rec@{n}": got["recall"]}
    return values


def teacher() -> dict[str, Any]:
    """The teacher, trained once, under its own scheduler."""
    folder = TEACHER.parent
    config = load_config(ROOT / "configs" / "digits" / "flow_matching.yaml", [f"output_dir={folder}", "resume=latest"])
    trainer = Trainer(build(config), quiet=True)
    trainer.train()
    if not TEACHER.is_dir():
        export(trainer)
    return {
        "method": "teacher",
        "steps": config.max_train_steps,
        "evaluations": 0,
        "seconds": 0.0,
        "MiB": 0.0,
    } | measured(trainer)


def main() -> None:
    rows = [teacher()]
    # A process a method, so that the memory is the method's; two at a time where there are cores for it.
    context = multiprocessing.get_context("spawn")
    workers = min(2, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        rows += tqdm(pool.map(run, METHODS), total=len(METHODS), unit="method", disable=None)
    at_most = rows[0]["FD@1"] / 4
    bounds = {f"{r['method']}, one-step Frechet distance": (r["FD@1"], at_most) for r in rows if r["method"] in QUARTER}
    report("distillation_digits", rows, bounds)


if __name__ == "__main__":
    main()
