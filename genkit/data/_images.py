"""From a decoded picture to a clean sample: what every source of pictures shares."""

from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from genkit.data.base import SeededConfig

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageConfig(SeededConfig):
    """How pictures become samples: resize so that the shorter side is ``size``, crop the centre, maybe mirror."""

    size: int = Field(ge=1, description="side of the square sample, in pixels")
    resize: Literal["bilinear", "bicubic", "lanczos", "adm"] = Field(
        default="bicubic",
        description="Pillow's antialiased filters, or ADM's rule: halve by box while twice too large, then bicubic",
    )
    horizontal_flip: bool = Field(default=False, description="mirror left to right with chance 1/2, drawn per visit")
    mode: Literal["RGB", "L"] = Field(default="RGB", description="colour, or one channel of grey")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Event shape ``(C, size, size)``."""
        return (len(self.mode), self.size, self.size)


def prepare(image: Image.Image, config: ImageConfig, flip: bool) -> Tensor:
    """``(C, size, size)`` float32 in [-1, 1], upright by the picture's EXIF orientation."""
    image = centre_crop(ImageOps.exif_transpose(image).convert(config.mode), config.size, config.resize)
    pixels = np.array(image, dtype=np.float32)
    sample = torch.from_numpy(pixels).view(config.size, config.size, -1).permute(2, 0, 1) / 127.5 - 1
    return (sample.flip(2) if flip else sample).contiguous()


def centre_crop(image: Image.Image, size: int, resize: str) -> Image.Image:
    """The centre ``size x size`` of the image, once resized so that its shorter side is ``size``."""
    if resize == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    new = (max(round(image.width * scale), size), max(round(image.height * scale), size))
    image = image.resize(new, _FILTERS.get(resize, Image.Resampling.BICUBIC))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
