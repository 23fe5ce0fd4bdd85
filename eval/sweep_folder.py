"""The folder of a sweep: its settings, the measured reference, and what is in it of cells that were killed."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from genkit.eval.extractors.base import Extractor
from genkit.eval.feature_files import load_features, save_features
from genkit.eval.inputs import ImageSet, UnreadableImage
from genkit.eval.metrics.base import FeatureSet
from genkit.eval.processes import rank_and_count, wait
from genkit.eval.result import Result
from genkit.eval.run import measure
from genkit.eval.runs import CELLS
from genkit.eval.saved import RESULT

SETTINGS, REFERENCE = "settings.json", "reference.safetensors"
_FIRST = 64  # images by whose pixels a reference is known again
_SPOOL = "genkit-images-"  # folders of images in the making
_NO_WEIGHTS = {".md", ".png", ".jpg", ".gitattributes"}


class SweepFolder:
    """``settings.json``, ``reference.safetensors``, and of every cell a folder below ``cells``.

    Args:
        folder: new, empty, or of an earlier sweep with the same settings.
        settings: of the sweep, JSON: what its cells have in common.

    Raises:
        ValueError: the folder holds something else, or a sweep with other settings; the error says which.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        self.folder = Path(folder)
        wanted = json.loads(json.dumps(settings))  # as it will be read back
        file = self.folder / SETTINGS
        if file.is_file():
            there = json.loads(file.read_text(encoding="utf-8"))
            differing = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
            if differing:
                told = "; ".join(f"{key} was {there.get(key)!r}, now {wanted.get(key)!r}" for key in differing)
                raise ValueError(f"output={str(folder)!r} holds a sweep with other settings ({told}); choose another")
        elif self.folder.is_dir() and any(
            path != partial(file) and not path.name.startswith(_SPOOL) for path in self.folder.iterdir()
        ):
            raise ValueError(f"output={str(folder)!r} is not empty and holds no {SETTINGS} of an earlier sweep")
        wait()  # until all have looked
        if first_process():
            # By a sweep that was killed while it was checked, or when the result of a cell had just been written.
            for left in [*self.folder.glob(f"{_SPOOL}*"), *self.folder.glob(f"{CELLS}/*/{_SPOOL}*")]:
                shutil.rmtree(left, ignore_errors=True)
            if not file.is_file():
                write(file, json.dumps(wanted, indent=2, ensure_ascii=False) + "\n")
        wait()

    def cell(self, name: str) -> Path:
        return self.folder / CELLS / name

    def is_done(self, name: str) -> bool:
        return (self.cell(name) / RESULT).is_file()

    def begin(self, name: str) -> Path:
        """The cell's folder, without what a killed process left there."""
        if first_process():
            shutil.rmtree(self.cell(name), ignore_errors=True)
            self.cell(name).mkdir(parents=True)
        wait()
        return self.cell(name)

    def results(self) -> dict[str, Result]:
        """Those of all cells that are done, also of values that axes had in an earlier call, by name."""
        done = sorted(path.parent for path in self.folder.glob(f"{CELLS}/*/{RESULT}"))
        return {folder.name: Result.load(folder / RESULT) for folder in done}

    def reference(self, images: ImageSet, extractor: Extractor, **settings: Any) -> FeatureSet:
        """What is measured of the reference: once, and read from the folder later."""
        file = self.folder / REFERENCE
        if file.is_file():
            side = load_features(file)
            if side.n == images.n:  # else images were left out, and which ones is not in the file
                return replace(side, images=images)
        side = measure(images, extractor, **settings)
        if first_process():
            save_features(file, side)
        wait()
        return side


def first_process() -> bool:
    """Whether this is the one that writes."""
    return rank_and_count()[0] == 0


def write(path: Path, text: str) -> None:
    """In one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial(path).write_text(text, encoding="utf-8")
    os.replace(partial(path), path)


def partial(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + ".partial")


def reference_identity(source: ImageSet | FeatureSet) -> dict[str, Any]:
    """What a reference is known by when the sweep goes on: number, kind, labels, prompts and its first images."""
    digest = hashlib.sha256()
    if isinstance(source, FeatureSet):
        digest.update(source.stats.mean.numpy().tobytes())
        told = {"n": source.stats.n, **source.stats.meta}
    else:
        for i in range(min(source.n, _FIRST)):
            try:
                digest.update(source.load(torch.tensor([i])).numpy().tobytes())
            except UnreadableImage as error:
                digest.update(str(error).encode())
        told = {"name": source.name, "n": source.n, "images": source.kind}
    if source.labels is not None:
        digest.update(source.labels.long().numpy().tobytes())
    digest.update(json.dumps(None if source.prompts is None else list(source.prompts)).encode())
    return {**told, "sha256": digest.hexdigest()[:12]}


def model_identity(model: str | Path) -> str:
    """What a model is known by: of a folder a hash of its files, else its name on the Hub."""
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    digest = hashlib.sha256()
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in _NO_WEIGHTS and p.name[0] != "."]
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:12]
