"""Sets of images to evaluate, read as uint8 batches: tensors, ``.npz`` files, sources of data; folders are beside."""

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.data.base import Source
from genkit.data.digits import Digits
from genkit.eval.preparation import Crop, Preparation, preparation
from genkit.quantizers.usage import CodeUsage
from genkit.rng import hash_seed


class UnreadableImage(ValueError):
    """Image ``index`` of a set cannot be read; the message names its file."""

    def __init__(self, index: int, message: str):
        super().__init__(message)
        self.index = index


class Maker:
    """What makes the images of a set when they are asked for.

    Attributes:
        made_with: its settings, by the names that tables have them under.
        originals: the images that are reconstructed, for one that does that.
        codes: what :meth:`count_codes` found, once it was asked for.
    """

    made_with: dict[str, Any]
    originals: "ImageSet | None" = None
    codes: CodeUsage | None = None

    def network_calls(self) -> float | None:
        """Calls of a network per image, as counted over all processes, which must all ask; None of others."""
        return None

    def head_calls(self) -> float | None:
        """Calls of a diffusion head per image, one after the other, likewise; None of networks without one."""
        return None

    def denoiser(self) -> Any:
        """The network as a :class:`genkit.denoisers.Denoiser`. Raises ``ValueError`` where there is none."""
        raise ValueError(f"{self.made_with['model']} has no denoiser")

    def start(self, count: int, seed: int) -> tuple[Tensor, Any]:
        """Noise ``(count, ...)``, and conditions from all over the set, for whoever follows the denoiser's flow."""
        raise ValueError(f"{self.made_with['model']} starts from no noise")

    def check_codes(self) -> None:
        """Raise ``ValueError`` where images do not go through the codes of a tokenizer."""
        raise ValueError(f"{self.made_with['model']} is no tokenizer whose codes could be counted")

    def count_codes(self) -> CodeUsage:
        """How often each code stands for a part of an image, over the whole set and all processes, which all ask.

        Raises:
            ValueError: as :meth:`check_codes`.
        """
        raise ValueError(f"{self.made_with['model']} is no tokenizer whose codes could be counted")

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Within, the networks may be called: they are in evaluation mode, as they were before after it."""
        return contextlib.nullcontext()


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
    source: "ImageSet | Source | Tensor | tuple[Tensor, Tensor] | str | Path",
    *,
    size: int | None = None,
    crop: Crop | None = None,
    strict: bool = False,
) -> ImageSet:
    """Images from ``source``.

    ``source`` is uint8 ``(n, C, H, W)``; a pair of that and labels ``(n,)``; a folder or a ``.zip`` of image files,
    whose ``metadata.jsonl`` names images, labels and prompts by ``file_name``, ``label`` and ``text``, or without one
    all its images, labels from sub-folders; a ``.npz`` with ``arr_0`` or ``images``, and labels in ``arr_1`` or
    ``labels``; a finite source of ``genkit.data``; ``"hf:NAME"``, a data set of the Hub, or
    ``"datasets:path=FOLDER,split=test"``, settings of :class:`genkit.data.hub_dataset.HubDataset`; or the word
    ``"digits"``, the 1,797 embedded ones.

    Args:
        size, crop: see :class:`genkit.eval.preparation.Preparation`; nothing is done to the images unless asked.
        strict: refuse what would be a counted note: an image that cannot be read, or was converted.

    Raises:
        ValueError: no images, none that can be read, mixed sizes without ``size``, another dtype than uint8.
        FileNotFoundError: no such file or folder.
    """
    prepare = preparation(size, crop)
    if isinstance(source, str | Path) and source != "digits":
        from genkit.eval.folders import read_folder

        text, path = str(source), Path(source)
        if text.startswith(("hf:", "datasets:")):
            from genkit.eval.hub_images import read_dataset

            return read_dataset(text, size=size, crop=crop)
        if path.is_dir() or path.is_file() and path.suffix == ".zip":
            return read_folder(path, prepare=prepare, strict=strict)
    images = _read(source)
    return images if prepare is None else prepared(images, prepare)


def _read(source: Any) -> ImageSet:
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
    if not isinstance(source, str | Path):
        raise ValueError(
            f"images of a {type(source).__name__}: accepted are folders, .zip, .npz, tensors and sources of "
            "genkit.data; of a pipeline take genkit.eval.generated.generated_images"
        )
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder (images come from a folder, .zip, .npz or 'digits')")
    if path.suffix == ".npz":
        return _from_npz(path)
    raise ValueError(f"{path}: expected a folder of images, a .zip or a .npz file")


def prepared(images: ImageSet, prepare: Preparation) -> ImageSet:
    """The same images after a preparation."""
    kind = f"{images.kind}, {prepare}" if images.kind else str(prepare)
    return replace(images, load=lambda indices: prepare.batch(images.load(indices)), kind=kind)


def drawn(images: ImageSet, n: int | None, seed: int, role: str) -> ImageSet:
    """n of the images, drawn at random by ``seed`` and ``role``, in their order; all if None.

    Raises:
        ValueError: there are fewer, or fewer than two.
    """
    if images.n < (n or 2):
        raise ValueError(f"{role} set {images.name!r} has {images.n} images, {n or 2} are needed")
    return images if n is None or n == images.n else images.subset(draw(images.n, n, seed, role))


def draw(of: int, n: int, seed: int, role: str) -> Tensor:
    """The numbers of n of so many images, ascending, at random by ``seed`` and ``role``."""
    generator = torch.Generator().manual_seed(hash_seed(seed, *role.encode()))
    return torch.randperm(of, generator=generator)[:n].sort().values


def same_images(a: ImageSet, b: ImageSet) -> bool:
    """Whether ``a`` is ``b``, or what of it could be read: of one name and kind and, if of as many, alike at eight
    places."""
    if (a.name, a.kind) != (b.name, b.kind) or a.n > b.n:
        return False
    places = torch.arange(min(a.n, 8)) * a.n // min(a.n, 8)
    return a.n < b.n or a.load is b.load or torch.equal(a.load(places), b.load(places))


def uint8_kind(shape: Sequence[int]) -> str:
    """``(C, H, W)`` in words: ``uint8 RGB 256x256``."""
    channels, height, width = shape
    return f"uint8 {({1: 'L', 3: 'RGB'}).get(channels, f'{channels} channels')} {width}x{height}"


def _from_tensor(name: str, images: Tensor, labels: Tensor | None) -> ImageSet:
    if images.dtype != torch.uint8 or images.ndim != 4:
        hint = "; to_uint8 converts floats in [-1, 1]" if images.is_floating_point() else ""
        raise ValueError(f"{name}: images must be uint8 (n, C, H, W), got {images.dtype} {tuple(images.shape)}{hint}")
    if not len(images):
        raise ValueError(f"{name}: no images")
    if labels is not None and (labels.ndim != 1 or len(labels) != len(images) or labels.is_floating_point()):
        raise ValueError(f"{name}: labels must be {len(images)} integers, got {labels.dtype} {tuple(labels.shape)}")
    kind = uint8_kind(images.shape[1:])
    labels = None if labels is None else labels.cpu()
    return ImageSet(name, len(images), lambda indices: images[indices], labels, kind=kind)


def _from_data(name: str, data: Source) -> ImageSet:
    if data.length is None or data.shape is None or len(data.shape) != 3:
        raise ValueError(f"{name}: expected a finite source of images, got length {data.length}, shape {data.shape}")
    labels = None if data.num_classes is None else data.__getitems__(range(len(data)))["class_labels"]
    kind = uint8_kind(data.shape)
    return ImageSet(name, len(data), lambda indices: to_uint8(data.__getitems__(indices)["x0"]), labels, kind=kind)


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
