"""A model of digits adapted to another style: LoRA, SaRA and all weights, what they learn and what they forget.

The model is that of configs/digits/flow_matching.yaml. The style is the inverse: dark digits on a light ground, of
which the digits 0 to 4 alone are shown, in 300 updates of 64. LoRA and SaRA train 35,840 numbers each: rank 4 beside
the layers of the blocks, or the smallest weights of the network; ``published`` is SaRA with its adjustment at half of
the steps. The rate of each is the best, by the distance in the new style, of 5e-4 and 1e-3 (all weights), 2e-3, 5e-3,
1e-2 and 2e-2 (LoRA), and 2e-3, 5e-3, 1e-2, 2e-2, 4e-2 and 5e-2 (SaRA); the row ``LoRA, slow`` has gone about as far as
SaRA has as published, so that these two say what is forgotten on the same way.

``FD new``, ``acc new``: samples of the digits 0 to 4, turned back to light on dark, against the real ones: Frechet
distance and accuracy by the classifier of ``genkit.eval``. ``FD old``, ``acc old``: samples of the digits 5 to 9, of
which no picture was shown, against the real ones in the old style: what is left of it. 16 steps, averaged weights.
``ms``: the median of a training step, methods taking turns on one thread. ``MiB``: weights, averages, the optimiser's
state and all that a step computes, alive at the most.

Bounds: LoRA and SaRA go 90 % of the way to the new style. SaRA, as published or not, is as far as the slow LoRA and
nearer to the old style by a tenth. A step of SaRA takes at most 1.5 times as long as one of all weights, and less
memory.

    python benchmarks/light_finetuning.py --check

Trains what is not below outputs/light_finetuning, the base first (about a minute); delete a folder there to have its
method trained anew.
"""

import json
import shutil
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from _common import paired, report
from _memory import Peak
from torch import Tensor
from tqdm import tqdm

from genkit.data.digits import Digits
from genkit.data.styled_digits import plain
from genkit.eval.inputs import to_uint8
from genkit.eval.run import evaluate
from genkit.rng import ItemRNG
from genkit.training.build import Run, build
from genkit.training.config import TrainConfig, load_config
from genkit.training.export import export
from genkit.training.samples import draw
from genkit.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "outputs" / "light_finetuning"
BASE = FOLDER / "base" / "pipeline"
STYLE, SHOWN = "inverted", (0, 1, 2, 3, 4)
MIB = 2**20

LORA = "adapter={kind: lora, rank: 4, alpha: 4, target_modules: [qkv, proj, fc1, fc2]}"
METHODS: dict[str, tuple[str, ...]] = {
    "LoRA": (LORA, "optimizer.lr=2e-2"),
    "LoRA, slow": (LORA, "optimizer.lr=2e-3"),
    "SaRA": (),
    "SaRA, published": ("adapter.progressive_ratio=0.5", "optimizer.lr=5e-2"),
    "all weights": ("adapter={kind: full}", "optimizer.lr=1e-3"),
}


def settings(name: str, folder: Path, **changes: Any) -> TrainConfig:
    """The recipe of SaRA, changed for a method."""
    own = [f"output_dir={folder}", f"model.pretrained={BASE}", "sampling.every=null", *METHODS[name]]
    return load_config(ROOT / "configs" / "digits" / "sara.yaml", own).model_copy(update=changes)


def row(name: str) -> dict[str, Any]:
    """Train by a method, and measure; reuses what is there."""
    folder = FOLDER / name.replace(", ", "_").replace(" ", "_")
    done = folder / "row.json"
    if done.is_file():
        return json.loads(done.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    trainer = Trainer(build(settings(name, folder)), quiet=True)
    trainer.train()
    trained = sum(p.numel() for p in trainer.roles["student"].parameters.values())
    with trainer.averaged():
        found = {"method": name, "trained": trained} | quality(trainer.run)
    found["MiB"] = memory(name)
    done.write_text(json.dumps(found, indent=2) + "\n")
    return found


def quality(run: Run) -> dict[str, float]:
    """Distance and accuracy of samples of the shown digits in the new style, and of the others in the old."""
    source = Digits()
    new = torch.isin(source.labels, torch.tensor(SHOWN))
    values = {}
    for kind, asked, style in (("new", new, STYLE), ("old", ~new, "plain")):
        labels = source.labels[asked]
        samples = [
            draw(run, {"class_labels": labels[items]}, ItemRNG(0, items), 16, (1, 8, 8))
            for items in torch.arange(len(labels)).split(256)
        ]
        images = to_uint8(plain(torch.cat(samples), style).contiguous())
        real = to_uint8(source.images[asked])
        got = evaluate(real, (images, labels), metrics=("frechet", "accuracy"), quiet=True).values
        values |= {f"FD {kind}": got["frechet_distance"], f"acc {kind}": got["class_accuracy"]}
    return values


def memory(name: str) -> float:
    """MiB that are alive at the most in the third step of a run: what it keeps, and what the step makes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(build(settings(name, Path(folder), max_train_steps=10)), quiet=True)
        steps = trainer.steps()
        next(steps), next(steps)
        (role,) = trainer.roles.values()
        states = [v for s in role.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        averages = [a for average in role.ema.averages.values() for a in average]  # type: ignore[union-attr]
        kept = (*trainer.objective.parameters(), *trainer.objective.buffers(), *states, *averages)
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        with Peak(kept) as peak:
            next(steps)
    return (sum(sizes.values()) + peak.alive.most) / MIB


def seconds() -> dict[str, float]:
    """Median seconds of a step, by method."""
    names = ["LoRA", "SaRA", "all weights"]
    with ExitStack() as stack:
        runs = {}
        for name in names:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            config = settings(name, folder, max_train_steps=1000, checkpointing_steps=1000)
            runs[name] = Trainer(build(config), quiet=True).steps()
        return {
            name: statistics.median(times)
            for name, times in paired({n: lambda n=n: next(runs[n]) for n in names}, rounds=20).items()
        }


def base() -> dict[str, Any]:
    """The model before, trained once."""
    folder = BASE.parent
    config = load_config(ROOT / "configs" / "digits" / "flow_matching.yaml", [f"output_dir={folder}", "resume=latest"])
    trainer = Trainer(build(config), quiet=True)
    trainer.train()
    if not BASE.is_dir():
        export(trainer)
    with trainer.averaged():
        return {"method": "before", "trained": 0} | quality(trainer.run) | {"MiB": ""}


def main() -> None:
    torch.set_num_threads(1)
    rows = [base(), *(row(name) for name in tqdm(METHODS, unit="method", disable=None))]
    # Methods of another kind, such as ZOODiP, add their rows here, with these columns, and their bounds below.
    took = seconds()
    for r in rows:
        r["ms"] = 1000 * took[r["method"]] if r["method"] in took else ""
    by = {r["method"]: r for r in rows}
    lora, slow, sara, published = (by[name] for name in ("LoRA", "LoRA, slow", "SaRA", "SaRA, published"))
    before = by["before"]["FD new"]
    bounds = {
        "LoRA, distance to the new style, of that before": (lora["FD new"] / before, 0.1),
        "SaRA, distance to the new style, of that before": (sara["FD new"] / before, 0.1),
        "SaRA as published, distance to the new style, of that before": (published["FD new"] / before, 0.1),
        "SaRA, numbers that train, of LoRA's": (sara["trained"] / lora["trained"], 1.0),
        "SaRA, distance to the new style, of the slow LoRA's": (sara["FD new"] / slow["FD new"], 1.0),
        "SaRA, distance to the old style, of the slow LoRA's": (sara["FD old"] / slow["FD old"], 0.9),
        "SaRA as published, distance to the new style, of the slow LoRA's": (published["FD new"] / slow["FD new"], 1.0),
        "SaRA as published, distance to the old style, of the slow LoRA's": (published["FD old"] / slow["FD old"], 0.9),
        "SaRA, seconds of a step, of all weights'": (took["SaRA"] / took["all weights"], 1.5),
        "SaRA, memory of a step, of all weights'": (sara["MiB"] / by["all weights"]["MiB"], 0.8),
    }
    report("light_finetuning", rows, bounds)


if __name__ == "__main__":
    main()
