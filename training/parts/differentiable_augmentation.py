"""Random changes of pictures, with a gradient, so that a discriminator does not learn a small data set by heart."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.rng import ItemRNG

Augmentation = Literal["color", "translation", "cutout"]


def augment(x: Tensor, rng: ItemRNG, kinds: Sequence[Augmentation]) -> Tensor:
    """Pictures ``(B, C, H, W)`` in [-1, 1], each changed in its own way by ``kinds``, in their order.

    ``color``: brightness by U[-1/2, 1/2], then the distance from the pixel's grey times U[0, 2], then that from the
    picture's mean times U[1/2, 3/2]. ``translation`` by up to an eighth of the sides, 0 coming in. ``cutout``: 0 in a
    box of half the sides, anywhere.

    Args:
        rng: a row a picture. Real and generated pictures are augmented alike, by draws of their own.

    Source: Zhao et al., "Differentiable augmentation for data-efficient GAN training", arXiv 2006.10738.
    """
    for kind in kinds:
        x = {"color": _color, "translation": _translation, "cutout": _cutout}[kind](x, rng)
    return x


def _color(x: Tensor, rng: ItemRNG) -> Tensor:
    brightness, saturation, contrast = rng.uniform((3, 1, 1, 1)).to(x).unbind(1)
    x = x + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def _translation(x: Tensor, rng: ItemRNG) -> Tensor:
    for axis in (2, 3):
        side = x.shape[axis]
        most = (side + 4) // 8
        moved = rng.integers(2 * most + 1)
        padded = F.pad(x, (0, 0, most, most) if axis == 2 else (most, most))
        at = torch.arange(side, device=x.device) + moved[:, None]
        at = at[:, None, :, None] if axis == 2 else at[:, None, None, :]
        x = padded.gather(axis, at.expand_as(x))
    return x


def _cutout(x: Tensor, rng: ItemRNG) -> Tensor:
    kept = torch.zeros((), dtype=torch.bool, device=x.device)
    for axis in (2, 3):
        side = x.shape[axis]
        length = (side + 1) // 2
        first = rng.integers(side + 1 - length % 2) - length // 2
        place = torch.arange(side, device=x.device) - first[:, None]
        outside = (place < 0) | (place >= length)
        kept = kept | (outside[:, None, :, None] if axis == 2 else outside[:, None, None, :])
    return x * kept
