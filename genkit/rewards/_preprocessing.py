"""From images on [0, 1] to what a network takes, in torch alone, so that gradients pass.

Eight-bit images that PIL resizes are the reference, because the models were trained behind it. PIL resizes in two
passes, horizontally first, and saturates between them; both at once would be off by 20/255 beside sharp edges.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from genkit.networks.image_classifiers import CLIP_MEAN, CLIP_STD

_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_FILE = "preprocessor_config.json"


def rounded(images: Tensor) -> Tensor:
    """Values on [0, 1] as eight bits hold them, with the gradient of the identity."""
    return images + ((images * 255).round() / 255 - images).detach()


@dataclass(frozen=True)
class Preprocessing:
    """Resize as PIL does, crop the centre, normalise.

    Args:
        size: ``(H, W)`` in pixels, or one number: that of the shorter side, the other one in proportion, rounded down.
        crop: ``(H, W)`` of the centre that is kept; everything if ``None``.
        mean, std: of the channels, of values on [0, 1].
        mode: ``bicubic`` or ``bilinear``.
        antialias: widen the filter where an image shrinks, as PIL does. Scores without differ by far: for comparisons
            with code that had none.
        quantise: round as eight bits do, at the start and after each pass.
        half: where half a pixel of the crop's margin goes: down in transformers, to the even side in torchvision.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None = None
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    mode: str = "bicubic"
    antialias: bool = True
    quantise: bool = False
    half: Callable[[float], int] = math.floor

    def resized_to(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, before the crop, of an image of ``height`` and ``width``."""
        if not isinstance(self.size, int):
            return self.size
        short, long = sorted((height, width))
        other = int(self.size * long / short)
        return (self.size, other) if height <= width else (other, self.size)

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, 3 or 1, h, w)`` on [0, 1] to ``(B, 3, H, W)``, normalised, in the same type."""
        images = images.expand(-1, len(self.mean), -1, -1)
        images = rounded(images) if self.quantise else images
        height, width = self.resized_to(*images.shape[-2:])
        for size in ((images.shape[-2], width), (height, width)):
            if images.shape[-2:] != size:
                images = F.interpolate(images, size, mode=self.mode, align_corners=False, antialias=self.antialias)
                images = images.clamp(0, 1)
                images = rounded(images) if self.quantise else images
        if self.crop is not None:
            top, left = (self.half((n - m) / 2) for n, m in zip((height, width), self.crop, strict=True))
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        return normalised(images, self.mean, self.std)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], **options: Any) -> "Preprocessing":
        """Of a classifier's ``preprocessor_config.json``.

        Raises:
            ValueError: an interpolation other than bilinear and bicubic, values that are not brought to [0, 1], sizes
                of another form than transformers have, a crop that is larger than the image.
        """
        for name, value in (("do_resize", True), ("do_rescale", True), ("rescale_offset", False)):
            if settings.get(name, value) is not value:
                raise ValueError(f"{_FILE}: {name}={settings[name]}; accepted is {value}")
        if not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
            raise ValueError(f"{_FILE}: rescale_factor={settings['rescale_factor']}; accepted is 1/255")
        mode = _MODES.get(settings.get("resample", 2))
        if mode is None:
            raise ValueError(f"{_FILE}: resample={settings['resample']}; accepted are 2 (bilinear) and 3 (bicubic)")
        size, crop = _sides(settings, "size"), None
        if settings.get("crop_pct") is not None:  # as ConvNeXts and ResNets have it
            side = size if isinstance(size, int) else size[0]
            crop = (side, side)
            size = int(side / settings["crop_pct"]) if side < 384 else crop
        elif settings.get("do_center_crop", "crop_size" in settings):
            height = _sides(settings, "crop_size")
            crop = (height, height) if isinstance(height, int) else height
        if isinstance(size, int) and crop is None:
            raise ValueError(f"{_FILE}: size={settings['size']} without a crop leaves images of several sizes")
        resized = (size, size) if isinstance(size, int) else size
        if crop is not None and (crop[0] > resized[0] or crop[1] > resized[1]):
            raise ValueError(f"{_FILE}: crop_size={crop} is larger than size={size}")
        normalise = settings.get("do_normalize", True)
        mean = settings["image_mean"] if normalise else (0.0,) * 3
        std = settings["image_std"] if normalise else (1.0,) * 3
        return cls(size, crop, tuple(mean), tuple(std), mode, **options)


def _sides(settings: Mapping[str, Any], name: str) -> int | tuple[int, int]:
    """``(H, W)``, or the length of the shorter side."""
    size = settings.get(name)
    if isinstance(size, int):
        return (size, size)
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return (size["height"], size["width"])
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    raise ValueError(f"{_FILE}: {name}={size}; accepted are a number, height and width, and shortest_edge")


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """``height`` and ``width`` scaled so that the longer one is ``size``."""
    scale = size / max(height, width)
    return round(height * scale), round(width * scale)


def padded(images: Tensor, size: int, *, antialias: bool = True, quantise: bool = False) -> Tensor:
    """The whole image in a black square of ``size``, normalised as for CLIP: what the HPS models see.

    Their code resizes floats, so there is one pass, without saturation, and ``quantise`` rounds the image alone.
    """
    images = images.expand(-1, 3, -1, -1)
    images = rounded(images) if quantise else images
    height, width = images.shape[-2:]
    target = fitted(height, width, size)
    if images.shape[-2:] != target:
        images = F.interpolate(images, target, mode="bicubic", align_corners=False, antialias=antialias)
    down, right = (size - n for n in target)
    images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
    return normalised(images, CLIP_MEAN, CLIP_STD)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images - mean) / std`` by channel."""
    centre, width = (images.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
    return (images - centre) / width
