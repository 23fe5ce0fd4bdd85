"""Peak signal-to-noise ratio of pairs of images."""

import torch
from torch import Tensor

from genkit.eval.metrics._per_image import PerPair


def psnr(x: Tensor, y: Tensor, *, data_range: float) -> Tensor:
    """``10 log10(data_range^2 / MSE)`` of every pair, dB: ``(B, ...)`` twice to ``(B,)``, float64.

    Equal images give infinity. The mean over pairs is not the ratio of the mean error (:class:`PSNR` gives both).

    Raises:
        ValueError: shapes that differ, a ``data_range`` that is not positive; it is never guessed from the images.
    """
    if not data_range > 0:
        raise ValueError(f"data_range={data_range}: expected the positive width of the values, as 1 or 255")
    return 10 * torch.log10(data_range**2 / _squared_error(x, y))


def _squared_error(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape or x.ndim < 2:
        raise ValueError(f"images of shapes {tuple(x.shape)} and {tuple(y.shape)}; accepted are two (B, ...)")
    return (x.double() - y.double()).square().flatten(1).mean(1)


class PSNR(PerPair):
    """``psnr``, the mean over pairs, and ``psnr_of_mean_error``, that of the mean squared error; higher is better.

    Images i of both sides must belong together. Where a pair is equal, ``psnr`` is infinite.
    """

    better = {"psnr": "higher"}

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return psnr(x, y, data_range=1)

    def summary(self, every: dict[str, Tensor]) -> dict[str, float]:
        error = (10 ** (-every["psnr"] / 10)).mean()
        return super().summary(every) | {"psnr_of_mean_error": (-10 * error.log10()).item()}
