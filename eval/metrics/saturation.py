"""Saturation: how far the colours are from grey."""

import torch
from torch import Tensor

from genkit.eval.inputs import ImageSet
from genkit.eval.metrics._per_image import PerImage, batches
from genkit.eval.metrics.base import FeatureSet


def saturation(images: Tensor) -> Tensor:
    """``(max - min) / max`` over red, green and blue, as in HSV and 0 for black: the mean over pixels.

    ``(B, 3, H, W)``, values ``>= 0`` of any range, to ``(B,)`` in float64 on [0, 1]. Too strong guidance shows in it.

    Raises:
        ValueError: another shape; grey images have none.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"saturation of images {tuple(images.shape)}; accepted are (B, 3, H, W)")
    high, low = images.double().amax(1), images.double().amin(1)
    return torch.where(high > 0, (high - low) / high, 0.0).flatten(1).mean(1)


class Saturation(PerImage):
    """``saturation`` of the generated images, to be compared with that of real ones."""

    better = {"saturation": None}

    def check(self, reference: ImageSet | FeatureSet | None, generated: ImageSet | FeatureSet | None) -> None:
        images = generated.images if isinstance(generated, FeatureSet) else generated
        if images is not None and " L " in f" {images.kind} ":
            raise ValueError(f"saturation of grey images ({images.kind}); accepted are RGB ones")

    def values(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, Tensor]:
        return {"saturation": torch.cat([saturation(batch) for batch in batches(generated)])}
