"""Contrast: how far the brightness of pixels is from the mean of their image."""

import torch
from torch import Tensor

from genkit.eval.metrics._per_image import PerImage, batches
from genkit.eval.metrics.base import FeatureSet


def contrast(images: Tensor) -> Tensor:
    """Root mean square contrast: the standard deviation over pixels of ``0.299 R + 0.587 G + 0.114 B``.

    ``(B, 3 or 1, H, W)`` on [0, 1] to ``(B,)`` in float64, 0 for one tone, 0.5 for black and white in equal parts.

    Raises:
        ValueError: another shape.

    Source: Peli, "Contrast in complex images", 1990; luma of ITU-R BT.601.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"contrast of images {tuple(images.shape)}; accepted are (B, 3 or 1, H, W)")
    weights = torch.tensor([0.299, 0.587, 0.114] if images.shape[1] == 3 else [1.0], dtype=torch.float64)
    luma = torch.einsum("bchw,c->bhw", images.double().cpu(), weights)
    return luma.flatten(1).std(1, correction=0)


class Contrast(PerImage):
    """``contrast`` of the generated images, to be compared with that of real ones."""

    better = {"contrast": None}

    def values(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, Tensor]:
        return {"contrast": torch.cat([contrast(batch) for batch in batches(generated)])}
