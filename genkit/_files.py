"""Reading and writing of shared folders: safetensors and JSON only, with errors that name the file."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


def contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as safetensors takes them."""
    return {key: value.detach().contiguous() for key, value in tensors.items()}


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in one move, readable to whom new files are: safetensors' own are the user's alone."""
    partial = file.with_name(file.name + ".partial")
    partial.touch()
    mode = partial.stat().st_mode
    save_file(contiguous(tensors), partial, metadata)
    partial.chmod(mode)
    os.replace(partial, file)


@contextmanager
def written(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files take the place of those in ``folder`` once all of them are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    try:
        yield part
        for file in sorted(part.rglob("*")):
            if file.is_file():
                goal = folder / file.relative_to(part)
                goal.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, goal)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; an error names the file and what is wrong with it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; found {listing(file.parent)}")
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({file.stat().st_size} bytes): {error}"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's content; an error names the file and what is wrong with it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; found {listing(file.parent)}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is truncated or no JSON file: {error}") from error


def first_line(error: Exception) -> str:
    """What an error says first, for one line that names the setting."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def listing(folder: Path) -> str:
    """Names of what is in ``folder``, for an error."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "an empty folder"


def load_into(module: nn.Module, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """``module.load_state_dict(tensors)``, refused as a whole where a name or a shape differs."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    different = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"{file} is of another {type(module).__name__}: {len(different)} tensors differ, the first is {key!r}, "
            f"found {found.get(key, 'nothing')}, wanted {wanted.get(key, 'nothing')}"
        )
    module.load_state_dict(tensors)


def local(folder_or_repo_id: str | Path, patterns: list[str]) -> Path:
    """The folder, or a copy of the repository of the Hub."""
    folder = Path(folder_or_repo_id)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(folder_or_repo_id)):
        raise FileNotFoundError(f"{folder_or_repo_id} is neither a folder nor a repository id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder_or_repo_id), allow_patterns=patterns))
    except OSError as error:  # no network, no repository, no permission
        raise FileNotFoundError(
            f"{folder_or_repo_id} is no folder here, and the Hub did not give a repository of this name: {error}"
        ) from error
