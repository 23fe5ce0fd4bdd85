"""How images of any size become square ones, said in words for the protocol."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genkit.data._images import centre_crop
from genkit.registry import unknown

Crop = Literal["center", "squash"]


@dataclass(frozen=True)
class Preparation:
    """Make every image ``size x size``.

    ``center`` is ADM's rule, what ImageNet statistics are made with: halve by box while twice too large, bicubic until
    the shorter side is ``size``, cut out the centre. ``squash`` is that of the fair-benchmark protocol (arXiv
    2603.14186): bicubic straight to ``size x size``, whatever the aspect. The filters are Pillow's, antialiased.

    Raises:
        ValueError: a size below 1, or another rule.
    """

    size: int
    crop: Crop = "center"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: must be at least 1")
        if self.crop not in get_args(Crop):
            raise ValueError(unknown("crop", self.crop, get_args(Crop)))

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.crop == "center":
            return centre_crop(image, self.size, "adm")
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def batch(self, images: Tensor) -> Tensor:
        """The same of uint8 ``(B, C, H, W)``. Raises ``ValueError`` unless there are 1 or 3 channels."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"size={self.size}: images of {images.shape[1]} channels cannot be resized; 1 and 3 can")
        pixels = [self(Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())) for image in images]
        return torch.stack([torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1) for image in pixels])

    def __str__(self) -> str:
        what = "box and bicubic, centre crop" if self.crop == "center" else "squashed, bicubic"
        return f"to {self.size}x{self.size} ({what})"


def preparation(size: int | None, crop: Crop | None) -> Preparation | None:
    """What is asked for by the two settings; ``crop`` is ``center`` unless given.

    Raises:
        ValueError: a crop without a size, or what :class:`Preparation` refuses.
    """
    if size is None:
        if crop is not None:
            raise ValueError(f"crop={crop!r} has no effect without size; give both")
        return None
    return Preparation(size, crop or "center")
