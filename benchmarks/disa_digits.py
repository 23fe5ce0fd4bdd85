"""How many calls of its diffusion head a masked autoregressive model of digits needs, by how steps are annealed.

The model is that of configs/digits/mar.yaml: 16 tokens, one an autoregressive step. 1,797 images a row, with the
classes of the real ones; calls are one after the other, evaluations are tokens of an image that went through the head,
both branches of guidance counted. Every row draws from timestep 950 down, so that rows differ in nothing but their
steps; from 999, as masked autoregression was published, samples of so small a model explode.

The constant schedule is the one that masked autoregression was published with: 100 steps for every token. Annealing
from T takes half the calls of a constant T at best, of whatever kind; what is saved beyond that, a lower T saves, which
constant schedules may have, too. The table therefore shows lower constants beside it: 33 takes a third of the calls. On
digits they do as well: pixels of handwriting are hardly more certain for what is around them.

Bounds: with and without guidance, linear annealing from 50 to 15 takes at least three times fewer calls than the
constant schedule, at a Frechet distance at most 5 % above.

    python benchmarks/disa_digits.py --check

Trains what is not below outputs/disa_digits; delete a folder there to have it made anew.
"""

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _common import report
from tqdm import tqdm

from genkit.data.digits import Digits
from genkit.eval.inputs import to_uint8
from genkit.eval.run import evaluate
from genkit.masked_autoregressive import MARSampling, MaskedAutoregressive
from genkit.pipelines.masked_autoregressive import MaskedAutoregressivePipeline
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer
from genkit.training.__main__ import train
from genkit.training.config import load_config

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "outputs" / "disa_digits"
BATCH = 599
SCALES = (1.0, 2.0)
CONSTANT = StepAnnealer(100, 100, "constant")
LOWER = [StepAnnealer(t, t, "constant") for t in (33, 20, 10)]
ANNEALED = [StepAnnealer(50, 15, kind) for kind in ("linear", "cosine", "two_stage")] + [StepAnnealer(25, 5)]
ROWS = [(scale, annealer) for scale in SCALES for annealer in (CONSTANT, *ANNEALED, *LOWER)]


def run(row: tuple[float, StepAnnealer]) -> dict[str, Any]:
    """A row of the table; reuses what is there."""
    torch.set_num_threads(1)
    scale, annealer = row
    done = FOLDER / f"{scale:g}_{annealer.kind}_{annealer.hi}_{annealer.lo}.json"
    if done.is_file():
        return json.loads(done.read_text())
    pipe = MaskedAutoregressivePipeline.from_pretrained(FOLDER / "mar" / "pipeline")
    model = MaskedAutoregressive(pipe.transformer.eval())
    settings = MARSampling(annealer, guidance_scale=scale, max_timestep=950)
    labels, images, began = Digits().labels, [], time.process_time()
    parts = torch.arange(len(labels)).split(BATCH)
    for items in parts:
        samples = model.sample(ItemRNG(0, items), model.encode(pipe, class_labels=labels[items]), settings)
        images.append(to_uint8(samples))
    seconds = time.process_time() - began
    metrics = ("frechet", "prdc", "accuracy")
    values = evaluate("digits", (torch.cat(images), labels), metrics=metrics, extractor="digits", quiet=True).values
    result = {
        "guidance": scale,
        "steps": annealer.kind,
        "hi": annealer.hi,
        "lo": annealer.lo,
        "head calls": model.head_calls // len(parts),
        "head evaluations": model.head_evaluations // len(parts),
        "CPU seconds": seconds,
        "Frechet distance": values["frechet_distance"],
        "accuracy": values["class_accuracy"],
        "recall": values["recall"],
    }
    done.write_text(json.dumps(result) + "\n")
    return result


def main() -> None:
    if not (FOLDER / "mar" / "pipeline").is_dir():
        train(load_config(ROOT / "configs" / "digits" / "mar.yaml", [f"output_dir={FOLDER / 'mar'}", "resume=latest"]))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context) as pool:
        rows = list(tqdm(pool.map(run, ROWS), total=len(ROWS), unit="row", disable=None))
    bounds = {}
    for scale in SCALES:
        constant, *others = (r for r in rows if r["guidance"] == scale)
        for row in (constant, *others):
            row["times fewer calls"] = constant["head calls"] / row["head calls"]
            row["relative distance"] = row["Frechet distance"] / constant["Frechet distance"]
        linear = next(r for r in others if (r["steps"], r["hi"], r["lo"]) == ("linear", 50, 15))
        bounds[f"share of calls, guidance {scale:g}"] = (1 / linear["times fewer calls"], 1 / 3)
        bounds[f"relative Frechet distance, guidance {scale:g}"] = (linear["relative distance"], 1.05)
    report("disa_digits", rows, bounds)


if __name__ == "__main__":
    main()
