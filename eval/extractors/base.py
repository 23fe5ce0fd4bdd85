"""What a feature extractor is, and the loop that runs one over batches of images."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.eval import by_name


@dataclass(frozen=True)
class Features:
    """``features`` float32 ``(B, d)``; ``logits`` ``(B, K)`` where the extractor classifies."""

    features: Tensor
    logits: Tensor | None = None


class Extractor(ABC):
    """Images to features.

    ``id`` names everything that changes a feature: network, resize rule, weights hash. Distances between features of
    different ids mean nothing, so every result carries it. ``dim`` is the size of a feature,
    ``num_classes`` that of the logits, None for an extractor without. ``distance`` is what the literature calls the
    Frechet distance of its features, and results with it.
    """

    id: str
    dim: int
    num_classes: int | None = None
    distance: str = "frechet_distance"

    @abstractmethod
    def __call__(self, images: Tensor) -> Features:
        """uint8 ``(B, C, H, W)`` -> ``Features``. Raises ``ValueError`` on channels or sizes it does not take."""

    def to(self, device: torch.device | str) -> "Extractor":
        """Move to ``device``; extractors that hold a network override this."""
        return self


class _FunctionExtractor(Extractor):
    def __init__(self, function: Callable[[Tensor], Tensor], dim: int, id: str):
        self.function, self.dim, self.id = function, dim, id

    def __call__(self, images: Tensor) -> Features:
        check_uint8(images, self.id)
        features = self.function(images)
        if not isinstance(features, Tensor) or features.shape != (len(images), self.dim):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"extractor {self.id!r} returned {got}; expected a tensor ({len(images)}, {self.dim})")
        return Features(features.float())


def function_extractor(function: Callable[[Tensor], Tensor], dim: int, id: str) -> Extractor:
    """Any function of uint8 ``(B, C, H, W)`` that returns ``(B, dim)`` as an extractor, under an ``id`` of your own."""
    return _FunctionExtractor(function, dim, id)


def get_extractor(extractor: "str | Extractor") -> Extractor:
    """An extractor as it is, or the one whose file in ``eval/extractors`` bears this name: ``clip:model=FOLDER``."""
    if isinstance(extractor, Extractor):
        return extractor
    if isinstance(extractor, str):
        return by_name.make("genkit.eval.extractors", Extractor, extractor, setting="extractor")
    raise ValueError(f"extractor={extractor!r}: expected a name or an Extractor; see function_extractor")


def check_uint8(images: Tensor, extractor: str) -> None:
    """Raise ``ValueError`` unless ``images`` is uint8."""
    if images.dtype != torch.uint8:
        raise ValueError(f"extractor {extractor!r} takes uint8 images, got {images.dtype}; see inputs.to_uint8")


def check_images(images: Tensor, *, channels: int, size: tuple[int, int], extractor: str) -> None:
    """Raise ``ValueError`` unless ``images`` is uint8 ``(B, channels, *size)``."""
    check_uint8(images, extractor)
    if images.ndim != 4 or tuple(images.shape[1:]) != (channels, *size):
        want = f"(B, {channels}, {size[0]}, {size[1]})"
        raise ValueError(
            f"extractor {extractor!r} takes images {want}, got {tuple(images.shape)}; others, as 'inception', take "
            "grey and RGB ones of any size. A folder is read as grey only where all its images are"
        )


def file_hash(path: str | Path) -> str:
    """The first 12 hexadecimal digits of a file's SHA-256: the weights' part of an extractor's id."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Turn TF32 off: with it features depend on the batch size by about 1e-3."""
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def extract(extractor: Extractor, batches: Iterable[Tensor], device: torch.device | str = "cpu") -> Iterator[Features]:
    """Features of each batch of uint8 ``(B, C, H, W)``, on the CPU: no gradients, no autocast, no TF32."""
    extractor = extractor.to(device)
    for batch in batches:
        with torch.no_grad(), full_float32(), torch.autocast(torch.device(device).type, enabled=False):
            out = extractor(batch.to(device))
        yield Features(out.features.cpu(), None if out.logits is None else out.logits.cpu())
