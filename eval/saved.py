"""The folder of an evaluation: its result, and the images that a report shows of it."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genkit.eval.metrics.base import FeatureSet
from genkit.eval.processes import rank_and_count, wait
from genkit.eval.result import Result

RESULT, IMAGES = "result.json", "images.safetensors"
FIRST = 64


@dataclass(frozen=True)
class Evaluation:
    """A result, and uint8 images ``(n, C, H, W)`` by what they are."""

    folder: Path
    result: Result
    images: dict[str, Tensor]


def save_evaluation(folder: str | Path, result: Result, reference: FeatureSet | None, generated: FeatureSet) -> Result:
    """Write ``images.safetensors`` and, last and in one move, ``result.json``: with it the evaluation is whole.

    The first images are the same ones in every evaluation of as many, so that reports show models side by side.
    """
    folder = Path(folder)
    shown: dict[str, Tensor] = {}
    if generated.images is not None:
        shown["first"] = generated.images.load(torch.arange(min(generated.images.n, FIRST)))
    if rank_and_count()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{IMAGES}.partial"
        save_file({name: images.contiguous() for name, images in shown.items()}, partial)
        os.replace(partial, folder / IMAGES)
        result.save(folder / RESULT)
    wait()
    return result


def load_evaluation(folder: str | Path) -> Evaluation:
    """What :func:`save_evaluation` wrote.

    Raises:
        FileNotFoundError: there is no whole evaluation in the folder.
    """
    folder = Path(folder)
    if not (folder / RESULT).is_file():
        raise FileNotFoundError(f"{folder}: no {RESULT}, so no evaluation that was finished")
    images = load_file(folder / IMAGES) if (folder / IMAGES).is_file() else {}
    return Evaluation(folder, Result.load(folder / RESULT), images)
