"""Checkpoints: folders ``checkpoint-<step>`` that are either whole or not there."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
OPTIMIZERS = "optimizers.pt"
FORMAT = "genkit training checkpoint 1"
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the text names the file, what was found and what was wanted."""


@dataclass
class Snapshot:
    """What a run needs to go on: tensors by file and name, optimiser state, and numbers that JSON can hold."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    optimizers: dict[str, Any]
    info: dict[str, Any]


def found(output_dir: Path) -> dict[int, Path]:
    """Complete checkpoints in ``output_dir`` by step, oldest first: those that have a manifest, written last."""
    paths = {int(m[1]): p for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))}
    return {step: paths[step] for step in sorted(paths) if (paths[step] / MANIFEST).is_file()}


def clean(output_dir: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for pattern in (f"{_TEMPORARY}*", f"{_REPLACED}*"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def save(output_dir: Path, snapshot: Snapshot) -> Path:
    """Write ``checkpoint-<step>``: to a temporary folder first, which then takes the name in one step.

    Raises:
        CheckpointError: the disk refused; nothing of the attempt stays and older checkpoints are as they were.
    """
    target = output_dir / f"checkpoint-{snapshot.step}"
    temporary = output_dir / f"{_TEMPORARY}{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in snapshot.tensors.items():
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
        torch.save(snapshot.optimizers, temporary / OPTIMIZERS)
        files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "step": snapshot.step, "files": files, **snapshot.info}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in temporary.iterdir():
            _flush(path)
        _replace(temporary, target)
    # torch reports a failed write as RuntimeError, safetensors as its own error
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = list(found(output_dir).values())
        kept = f"the last good checkpoint is {last[-1]}" if last else "there is no earlier checkpoint"
        raise CheckpointError(f"{target} could not be written: {error}; {kept}") from error
    return target


def _flush(path: Path) -> None:
    """Onto the disk: a name that outlives a power cut must not stand for data that did not."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _replace(temporary: Path, target: Path) -> None:
    old = target.with_name(_REPLACED + target.name)
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def prune(output_dir: Path, limit: int | None, keep: Path | None) -> None:
    """Delete the oldest until ``limit`` are left; never the newest, nor ``keep``, the one that the run resumed from."""
    paths = list(found(output_dir).values())
    old = [p for p in paths[:-1] if keep is None or p.resolve() != keep.resolve()]
    for path in old[: max(len(paths) - limit, 0) if limit else 0]:
        # Renamed first, so that a kill leaves no checkpoint that is half there.
        doomed = path.with_name(_REPLACED + path.name)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def locate(resume: str, output_dir: Path) -> Path | None:
    """The folder that ``resume`` names; ``None`` for ``latest`` where there is none yet.

    Raises:
        CheckpointError: no such folder.
    """
    if resume == "latest":
        return next(reversed(found(output_dir).values()), None)
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(f"resume={resume!r}: no such folder; accepted are 'latest' and the path of a checkpoint")
    return path


def load(path: Path, wanted: Mapping[str, Mapping[str, Tensor]]) -> Snapshot:
    """Read a checkpoint whose tensors must be those of ``wanted`` (by file, then name), in name and shape.

    Raises:
        CheckpointError: not a checkpoint of this trainer, a file that is missing or truncated, other tensors.
    """
    manifest = read_manifest(path)
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, wanted a file of {size} bytes; {_ADVICE}")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, wanted {size}: it is truncated; {_ADVICE}")
    tensors = {}
    for name, expected in wanted.items():
        file = path / f"{name}.safetensors"
        if not file.is_file():
            there = sorted(p.name for p in path.iterdir())
            raise CheckpointError(f"{file} is missing, found {there}: this checkpoint belongs to another run")
        try:
            tensors[name] = load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a safetensors file ({error}); {_ADVICE}") from None
        _compare(file, tensors[name], expected)
    try:
        optimizers = torch.load(path / OPTIMIZERS, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path / OPTIMIZERS} cannot be read ({error}); {_ADVICE}") from None
    return Snapshot(manifest["step"], tensors, optimizers, manifest)


_ADVICE = "resume from another checkpoint by its path, or delete this one"


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: ``step``, ``config``, ``files`` and more.

    Raises:
        CheckpointError: it is none of this trainer.
    """
    file = path / MANIFEST
    if not file.is_file():
        there = sorted(p.name for p in path.iterdir())[:8]
        raise CheckpointError(f"{file} is missing, found {there}: {path} is not a {FORMAT!r}")
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}), wanted the manifest of a {FORMAT!r}") from None
    got = manifest.get("format") if isinstance(manifest, dict) else None
    if got != FORMAT:
        raise CheckpointError(f"{file} has format {got!r}, wanted {FORMAT!r}")
    return manifest


def _compare(file: Path, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(wanted) - set(got)), sorted(set(got) - set(wanted))
    if missing or extra:
        raise CheckpointError(
            f"{file} belongs to another network: it lacks {len(missing)} wanted tensors {missing[:3]} and holds "
            f"{len(extra)} unknown ones {extra[:3]}"
        )
    for name, tensor in wanted.items():
        if got[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: tensor {name!r} has shape {tuple(got[name].shape)}, wanted {tuple(tensor.shape)}"
            )
