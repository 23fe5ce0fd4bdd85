"""Structural similarity of pairs of images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.eval.metrics._per_image import PerPair

_SIZE, _SIGMA = 11, 1.5


def ssim(x: Tensor, y: Tensor, *, data_range: float) -> Tensor:
    """``(2 mx my + c1)(2 sxy + c2) / ((mx^2 + my^2 + c1)(sx^2 + sy^2 + c2))``, the mean over pixels and channels.

    ``(B, C, H, W)`` twice to ``(B,)``, float64, at most 1. Means and (co)variances are those of a Gaussian window of
    11 x 11 pixels, sigma 1.5, where it lies inside the image; ``c1 = (0.01 data_range)^2, c2 = (0.03 data_range)^2``.

    Raises:
        ValueError: shapes that differ, images smaller than the window, a ``data_range`` that is not positive.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    if not data_range > 0:
        raise ValueError(f"data_range={data_range}: expected the positive width of the values, as 1 or 255")
    if x.shape != y.shape or x.ndim != 4 or min(x.shape[2:]) < _SIZE:
        raise ValueError(
            f"ssim: images of shapes {tuple(x.shape)} and {tuple(y.shape)}; accepted are two (B, C, H, W) of at least "
            f"{_SIZE} x {_SIZE} pixels, its window"
        )
    x, y = x.double(), y.double()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my, xx, yy, xy = _blur(torch.stack((x, y, x * x, y * y, x * y)).flatten(0, 2)[:, None]).unflatten(
        0, (5, *x.shape[:2])
    )[:, :, :, 0]
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    index = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return index.flatten(1).mean(1)


def _blur(images: Tensor) -> Tensor:
    """By the window, separably, valid pixels only: ``(N, 1, H, W)``."""
    at = torch.arange(_SIZE, dtype=images.dtype, device=images.device) - _SIZE // 2
    window = torch.exp(-at.square() / (2 * _SIGMA**2))
    window = window / window.sum()
    return F.conv2d(F.conv2d(images, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


class SSIM(PerPair):
    """``ssim``, the mean over pairs; higher is better. Images i of both sides must belong together."""

    better = {"ssim": "higher"}

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return ssim(x, y, data_range=1)
