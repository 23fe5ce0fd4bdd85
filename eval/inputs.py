"""Sets of images to evaluate: tensors, folders, ``.npz`` files and the embedded digits, all read as uint8 batches."""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from genkit.data.base import Source
from genkit.data.digits import Digits

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}


class UnreadableImage(ValueError):
    """Image ``index`` of a set cannot be read; the message names its file."""

    def __init__(self, index: int, message: str):
        super().__init__(message)
        self.index = index


class Maker:
    """What makes the images of a set when they are asked for.

    Attributes:
        made_with: its settings, by the names that tables have them under.
    """

    made_with: dict[str, Any]

    def network_calls(self) -> float | None:
        """Calls of a denoising network per image, as counted over all processes, which must all ask; None of others."""
        return None

    def denoiser(self) -> Any:
        """The network as a :class:`genkit.denoisers.Denoiser`. Raises ``ValueError`` where there is none."""
        raise ValueError(f"{self.made_with['model']} has no denoiser")

    def start(self, items: Sequence[int], seed: int) -> tuple[Tensor, Any]:
        """Noise ``(B, ...)`` and conditions of some items, for whoever follows the flow of the denoiser."""
        raise ValueError(f"{self.made_with['model']} starts from no noise")


@dataclass(frozen=True)
class ImageSet:
    """n images of one size: ``load(indices)`` gives uint8 ``(B, C, H, W)``; ``labels`` ``(n,)`` and ``prompts``, n
    texts, are what they were asked for, where known.

    ``kind`` says how they are stored and what was done to them (``PNG RGB 256x256``), ``notes`` what to beware of.
    ``load`` raises ``UnreadableImage`` for one that turns out not to be readable. ``model`` makes them, where they are
    not there but made when asked for. ``class_names`` are the names of labels, where known.
    """

    name: str
    n: int
    load: Callable[[Tensor], Tensor]
    labels: Tensor | None = None
    prompts: Sequence[str] | None = None
    kind: str | None = None
    notes: tuple[str, ...] = ()
    model: Maker | None = None
    class_names: Mapping[int, str] | None = None

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for indices in torch.arange(self.n).split(batch_size):
            yield self.load(indices)

    def subset(self, indices: Tensor) -> "ImageSet":
        labels = None if self.labels is None else self.labels[indices]
        prompts = None if self.prompts is None else [self.prompts[i] for i in indices.tolist()]
        return replace(
            self, n=len(indices), load=lambda chosen: self._of_subset(indices, chosen), labels=labels, prompts=prompts
        )

    def _of_subset(self, indices: Tensor, chosen: Tensor) -> Tensor:
        try:
            return self.load(indices[chosen])
        except UnreadableImage as error:
            raise UnreadableImage(int((indices == error.index).nonzero()[0]), str(error)) from error


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8 by round((x + 1) 127.5); values outside are clamped, NaN is refused."""
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes float images in [-1, 1], got {images.dtype}")
    if images.isnan().any():
        raise ValueError("to_uint8: the images contain NaN")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def read_images(
    source: "ImageSet | Source | Tensor | tuple[Tensor, Tensor] | str | Path", *, strict: bool = False
) -> ImageSet:
    """Images from ``source``.

    ``source`` is uint8 ``(n, C, H, W)``; a pair of that and labels ``(n,)``; a folder, whose ``metadata.jsonl`` names
    images, labels and prompts by ``file_name``, ``label`` and ``text``, or without one all its images, labels from
    sub-folders; a ``.npz`` with ``arr_0`` or ``images``, and labels in ``arr_1`` or ``labels``; a finite source of
    ``genkit.data``; or the word ``"digits"``, the 1,797 embedded ones.

    Raises:
        ValueError: no images, an image that cannot be read (named), mixed sizes or modes, another dtype than uint8.
        FileNotFoundError: no such file or folder.
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, Source):
        return _from_data(type(source).__name__.lower(), source)
    if isinstance(source, Tensor):
        return _from_tensor("tensor", source, None)
    if isinstance(source, tuple):
        return _from_tensor("tensor", *source)
    if source == "digits":
        return _from_data("digits", Digits())
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder (images come from a folder, a .npz or 'digits')")
    if path.suffix == ".npz":
        return _from_npz(path)
    raise ValueError(f"{path}: expected a folder of images or a .npz file")


def _from_tensor(name: str, images: Tensor, labels: Tensor | None) -> ImageSet:
    if images.dtype != torch.uint8 or images.ndim != 4:
        hint = "; to_uint8 converts floats in [-1, 1]" if images.is_floating_point() else ""
        raise ValueError(f"{name}: images must be uint8 (n, C, H, W), got {images.dtype} {tuple(images.shape)}{hint}")
    if not len(images):
        raise ValueError(f"{name}: no images")
    if labels is not None and (labels.ndim != 1 or len(labels) != len(images) or labels.is_floating_point()):
        raise ValueError(f"{name}: labels must be {len(images)} integers, got {labels.dtype} {tuple(labels.shape)}")
    return ImageSet(name, len(images), lambda indices: images[indices], None if labels is None else labels.cpu())


def _from_data(name: str, data: Source) -> ImageSet:
    if data.length is None or data.shape is None or len(data.shape) != 3:
        raise ValueError(f"{name}: expected a finite source of images, got length {data.length}, shape {data.shape}")
    labels = None if data.num_classes is None else data.__getitems__(range(len(data)))["class_labels"]
    return ImageSet(name, len(data), lambda indices: to_uint8(data.__getitems__(indices)["x0"]), labels)


def _from_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npz ({error})") from error
    images = next((arrays[key] for key in ("images", "arr_0") if key in arrays), None)
    if images is None:
        raise ValueError(f"{path}: expected an array 'images' or 'arr_0', found {sorted(arrays)}")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{path}: images must be uint8 of 3 or 4 dimensions, got {images.dtype} {images.shape}")
    last, first = images.shape[3] in (1, 3), images.shape[1] in (1, 3)
    if last == first:
        raise ValueError(f"{path}: cannot tell which axis of {images.shape} holds the 1 or 3 channels")
    labels = next((arrays[key] for key in ("labels", "arr_1") if key in arrays), None)
    batch = torch.from_numpy(images)
    return _from_tensor(
        path.name,
        batch.permute(0, 3, 1, 2) if last else batch,
        None if labels is None else torch.from_numpy(labels),
    )


def _from_folder(folder: Path) -> ImageSet:
    rows = _metadata(folder)
    listed = [row["file_name"] for row in rows if "file_name" in row]
    files = [folder / name for name in listed] or sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
    )
    if not files:
        raise ValueError(f"{folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    kinds = [_kind(path) for path in files]
    for path, kind in zip(files, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(f"mixed images: {files[0]} is {kinds[0]}, {path} is {kind} (mode, width, height)")
    mode = kinds[0][0]

    def load(indices: Tensor) -> Tensor:
        return torch.stack([_decode(i, files[i], mode) for i in indices.tolist()])

    labels, prompts = _folder_labels(folder, files, rows), _folder_prompts(folder, rows)
    return ImageSet(folder.name, len(files), load, labels, prompts)


def _kind(path: Path) -> tuple[str, int, int]:
    """Mode after decoding, width and height, from the file's header alone."""
    try:
        with Image.open(path) as image:
            mode, size = image.mode, image.size
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error
    if mode not in MODES:
        raise ValueError(f"{path}: image mode {mode!r} is not taken. Accepted: {', '.join(MODES)}.")
    return MODES[mode], *size


def _decode(i: int, path: Path, mode: str) -> Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert(mode))
    except (OSError, SyntaxError) as error:
        raise UnreadableImage(i, f"{path}: cannot be decoded ({error})") from error
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)


def _metadata(folder: Path) -> list[dict]:
    """The rows of ``metadata.jsonl``; where there are some, the images that they name are the set."""
    path = folder / "metadata.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _folder_labels(folder: Path, files: list[Path], rows: list[dict]) -> Tensor | None:
    """Labels of ``metadata.jsonl``, else of sub-folders: their numbers if all are numbers, else in sorted order."""
    metadata = folder / "metadata.jsonl"
    if rows:
        known = {row["file_name"]: row["label"] for row in rows if "file_name" in row and "label" in row}
        if not known:
            return None
        names = [path.relative_to(folder).as_posix() for path in files]
        absent = [name for name in names if name not in known]
        if absent:
            raise ValueError(f"{metadata}: no label for {absent[0]} ({len(absent)} images lack one)")
        return torch.tensor([int(known[name]) for name in names])
    if any(path.parent == folder for path in files):
        return None
    classes = [path.relative_to(folder).parts[0] for path in files]
    names = sorted(set(classes))
    numbers = {name: int(name) if all(n.isdecimal() for n in names) else i for i, name in enumerate(names)}
    return torch.tensor([numbers[name] for name in classes])


def _folder_prompts(folder: Path, rows: list[dict]) -> list[str] | None:
    """The texts of ``metadata.jsonl``, in the order of its images."""
    listed = [row for row in rows if "file_name" in row]
    absent = [row["file_name"] for row in listed if "text" not in row]
    if len(absent) == len(listed):
        return None
    if absent:
        raise ValueError(f"{folder / 'metadata.jsonl'}: no text for {absent[0]} ({len(absent)} images lack one)")
    return [str(row["text"]) for row in listed]
