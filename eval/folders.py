"""Folders and zips of image files, as any camera, library or model wrote them, read as one set."""

import io
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from genkit.eval.inputs import ImageSet, UnreadableImage
from genkit.eval.preparation import Preparation

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
GREY, ALPHA, OTHER = {"1", "L", "LA"}, {"RGBA", "LA", "PA"}, {"CMYK", "YCbCr"}
MODES = GREY | ALPHA | OTHER | {"RGB", "P"}
BAD = (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError)
METADATA = "metadata.jsonl"


def read_folder(path: Path, *, prepare: Preparation | None = None, strict: bool = False) -> ImageSet:
    """The images of a folder or a ``.zip``, as :func:`genkit.eval.inputs.read_images` says.

    Headers are read here, pixels later. All become RGB, or grey where all are grey, as Pillow's ``convert`` does: alpha
    is dropped, not blended. What was left out or converted is counted in the notes.

    Raises:
        ValueError: no image, or none that can be read; mixed sizes without ``prepare``; 16-bit or float images; with
            ``strict`` whatever would be a note.
    """
    files = _Zip(path) if path.is_file() else _Folder(path)
    rows = _metadata(files)
    listed = [row["file_name"] for row in rows if "file_name" in row]
    names = listed or sorted(name for name in files.names if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise ValueError(f"{path}: no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    heads: dict[str, _Head] = {}
    unreadable: dict[str, str] = {}
    for name in tqdm(dict.fromkeys(names), desc=f"headers of {path.name}", unit="image", delay=2, disable=None):
        try:
            heads[name] = _head(files, name)
        except BAD as error:
            unreadable[name] = _why(error, files, name)
    readable = [name for name in names if name in heads]
    if not readable:
        name = names[0]
        raise ValueError(f"{path}: none of {len(names)} images can be read; {name}: {unreadable[name]}")
    for name in readable:
        if heads[name].mode not in MODES:
            raise ValueError(
                f"{path / name}: image mode {heads[name].mode!r} is not taken; accepted are 8 bits in the modes "
                f"{', '.join(sorted(MODES))}"
            )
    sizes = Counter(heads[name].size for name in readable)
    if len(sizes) > 1 and prepare is None:
        first = readable[0]
        other = next(name for name in readable if heads[name].size != heads[first].size)
        raise ValueError(
            f"{path}: mixed images of {len(sizes)} sizes, {first} is {_x(heads[first].size)}, {other} is "
            f"{_x(heads[other].size)}; size={min(min(head.size) for head in (heads[first], heads[other]))} "
            "with crop='center' or 'squash' makes them one"
        )
    mode = "L" if all(heads[name].mode in GREY for name in readable) else "RGB"
    converted: dict[str, Callable[[_Head], bool]] = {
        "grey, made RGB": lambda head: head.mode in GREY and mode == "RGB",
        "with alpha, which was dropped": lambda head: head.mode in ALPHA or head.transparent,
        "CMYK or YCbCr, made RGB": lambda head: head.mode in OTHER,
    }
    left_out = [f"{name} ({unreadable[name]})" for name in names if name in unreadable]
    found = {"left out, not readable": left_out}
    found |= {what: [name for name in readable if is_so(heads[name])] for what, is_so in converted.items()}
    notes = [_note(path, len(names), what, which) for what, which in found.items() if which]
    if strict and notes:
        raise ValueError("strict: " + "; ".join(notes))

    def load(indices: Tensor) -> Tensor:
        return torch.stack([_decode(i, files, readable[i], mode, prepare) for i in indices.tolist()])

    formats = Counter(heads[name].format for name in readable)
    stored = " and ".join(f if len(formats) == 1 else f"{f} ({count})" for f, count in sorted(formats.items()))
    kind = f"{stored} {mode} {_x(next(iter(sizes))) if len(sizes) == 1 else f'of {len(sizes)} sizes'}"
    kind += f", {prepare}" if prepare else ""
    labels, class_names = _labels(files, names, readable, rows)
    name = path.stem if path.is_file() else path.name
    prompts = _prompts(files, readable, rows)
    return ImageSet(name, len(readable), load, labels, prompts, kind, tuple(notes), class_names=class_names)


class _Folder:
    def __init__(self, path: Path):
        self.path = path

    @property
    def names(self) -> Iterable[str]:
        return (p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())

    def read(self, name: str) -> bytes | None:
        """What is in a file; None where there is no such file."""
        return (self.path / name).read_bytes() if (self.path / name).is_file() else None

    def open(self, name: str) -> Image.Image:
        return Image.open(self.path / name)


class _Zip:
    def __init__(self, path: Path):
        self.path = path
        try:
            self._open_again()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: not a readable .zip ({error})") from error

    def _open_again(self) -> None:
        self._file, self._process = zipfile.ZipFile(self.path), os.getpid()

    @property
    def names(self) -> Iterable[str]:
        return (n for n in self._file.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/"))

    def read(self, name: str) -> bytes | None:
        if self._process != os.getpid():  # a forked process would move the position of this one
            self._open_again()
        return self._file.read(name) if name in self._file.NameToInfo else None

    def open(self, name: str) -> Image.Image:
        try:
            content = self.read(name)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise OSError(str(error)) from error
        if content is None:
            raise FileNotFoundError("no such file in the zip")
        return Image.open(io.BytesIO(content))


class _Head:
    """What the header of an image file says."""

    def __init__(self, image: Image.Image):
        # Pillow reads the higher 8 of 16 bits of a colour image and does not say so; the raw mode does.
        tiles: Any = getattr(image, "tile", ())
        raw = [part for tile in tiles for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
        deep = [part for part in raw if isinstance(part, str) and ";16" in part]
        self.mode = deep[0] if deep else image.mode
        self.size, self.format = image.size, image.format or "unknown"
        self.transparent = "transparency" in image.info


def _head(files: "_Folder | _Zip", name: str) -> _Head:
    with files.open(name) as image:
        return _Head(image)


def _decode(i: int, files: "_Folder | _Zip", name: str, mode: str, prepare: Preparation | None) -> Tensor:
    try:
        with files.open(name) as opened:
            image = opened.convert(mode)
    except BAD as error:
        why = _why(error, files, name)
        raise UnreadableImage(i, f"{files.path.name}/{name}: cannot be decoded ({why})") from error
    if prepare is not None:
        image = prepare(image)
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)


def _why(error: BaseException, files: "_Folder | _Zip", name: str) -> str:
    """Without the path to the folder: results are sent to others."""
    return str(error).replace(str(files.path / name), name) or type(error).__name__


def _x(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _note(path: Path, n: int, what: str, which: list[str]) -> str:
    return f"{len(which)} of {n} images of {path.name} were {what}: {'; '.join(which[:3])}{'; ...' * (len(which) > 3)}"


def _metadata(files: "_Folder | _Zip") -> list[dict[str, Any]]:
    """The rows of ``metadata.jsonl``; where there are some, the images that they name are the set."""
    content = files.read(METADATA)
    if content is None:
        return []
    rows = []
    for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{files.path / METADATA}: line {number} is not JSON ({error})") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{files.path / METADATA}: line {number} is no JSON object")
    return rows


def _labels(
    files: "_Folder | _Zip", names: list[str], readable: list[str], rows: list[dict[str, Any]]
) -> tuple[Tensor | None, dict[int, str] | None]:
    """Of the readable ones, the labels of ``metadata.jsonl``, else of sub-folders: their numbers if all are numbers,
    else in sorted order, then with these names."""
    if rows:
        known = {row["file_name"]: row["label"] for row in rows if "file_name" in row and "label" in row}
        if not known:
            return None, None
        absent = [name for name in names if name not in known]
        if absent:
            raise ValueError(f"{files.path / METADATA}: no label for {absent[0]} ({len(absent)} images lack one)")
        wrong = [name for name in names if isinstance(known[name], bool) or not isinstance(known[name], int)]
        if wrong:
            raise ValueError(f"{files.path / METADATA}: label={known[wrong[0]]!r} of {wrong[0]}: expected an integer")
        return torch.tensor([known[name] for name in readable]), None
    if any("/" not in name for name in names):
        return None, None
    classes = [name.partition("/")[0] for name in readable]
    folders = sorted({name.partition("/")[0] for name in names})
    if all(folder.isdecimal() for folder in folders):
        return torch.tensor([int(folder) for folder in classes]), None
    numbers = {folder: i for i, folder in enumerate(folders)}
    return torch.tensor([numbers[folder] for folder in classes]), dict(enumerate(folders))


def _prompts(files: "_Folder | _Zip", names: list[str], rows: list[dict[str, Any]]) -> list[str] | None:
    """The texts of ``metadata.jsonl``, in the order of its images."""
    listed = [row for row in rows if "file_name" in row]
    absent = [row["file_name"] for row in listed if "text" not in row]
    if len(absent) == len(listed):
        return None
    if absent:
        raise ValueError(f"{files.path / METADATA}: no text for {absent[0]} ({len(absent)} images lack one)")
    kept = set(names)
    return [str(row["text"]) for row in listed if row["file_name"] in kept]
