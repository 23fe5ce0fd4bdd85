"""From a picture to what a poor camera, an upload and a screenshot leave of it: low-resolution training inputs."""

import io
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor
from torch.nn import functional as F

Range = tuple[float, float]
# Kernels of the blur and how often each is drawn: Gaussian, its generalised form, and a plateau, isotropic or not.
_KERNELS = {
    ("gaussian", True): 0.45,
    ("gaussian", False): 0.25,
    ("generalised", True): 0.12,
    ("generalised", False): 0.03,
    ("plateau", True): 0.12,
    ("plateau", False): 0.03,
}
_RESIZES = ("area", "bilinear", "bicubic")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Resize(_Section):
    """The picture made smaller and nothing else, antialiased: the textbook's degradation."""

    kind: Literal["resize"] = "resize"
    filter: Literal["area", "bilinear", "bicubic"] = "bicubic"

    def __call__(self, picture: Tensor, scale: int, generator: torch.Generator) -> Tensor:
        size = (picture.shape[-2] // scale, picture.shape[-1] // scale)
        return _resize(picture, size, self.filter, antialias=self.filter != "area").clamp(0, 1)


class Stage(_Section):
    """One pass of blur, resizing, noise and compression.

    ``blur_probability``: of any blur. ``sinc_probability``: of a ringing kernel in place of a bell. ``kernel_sizes``:
    odd sides. ``blur_sigma``: standard deviations of the bells in pixels. ``resize_probability``: of enlarging and of
    shrinking, by factors within ``resize_range``; else the size stays. ``gaussian_probability``: of Gaussian noise of
    ``noise_sigma`` (of 255), else Poisson noise of ``poisson_scale``; ``grey_probability``: that all channels have the
    same. ``jpeg_quality``: whole numbers between its ends.
    """

    blur_probability: float = Field(1.0, ge=0, le=1)
    sinc_probability: float = Field(0.1, ge=0, le=1)
    kernel_sizes: tuple[int, ...] = Field((7, 9, 11, 13, 15, 17, 19, 21), min_length=1)
    blur_sigma: Range = (0.2, 3.0)
    resize_probability: tuple[float, float] = (0.2, 0.7)
    resize_range: Range = (0.15, 1.5)
    gaussian_probability: float = Field(0.5, ge=0, le=1)
    noise_sigma: Range = (1.0, 30.0)
    poisson_scale: Range = (0.05, 3.0)
    grey_probability: float = Field(0.4, ge=0, le=1)
    jpeg_quality: tuple[int, int] = (30, 95)

    @field_validator("kernel_sizes")
    @classmethod
    def _odd(cls, value):
        if any(k < 3 or k % 2 == 0 for k in value):
            raise ValueError("accepted are odd numbers from 3 on")
        return value

    @field_validator("blur_sigma", "resize_range", "noise_sigma", "poisson_scale", "jpeg_quality")
    @classmethod
    def _increasing(cls, value):
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be (low, high) with 0 < low <= high")
        return value

    @field_validator("jpeg_quality")
    @classmethod
    def _quality(cls, value):
        if value[1] > 100:
            raise ValueError("accepted are qualities from 1 to 100")
        return value

    @field_validator("resize_probability")
    @classmethod
    def _share(cls, value):
        if min(value) < 0 or sum(value) > 1:
            raise ValueError("must be two probabilities whose sum is at most 1")
        return value


class RealESRGAN(_Section):
    """Two passes of blur, resizing, noise and JPEG, then the final size, a sinc filter and JPEG in either order.

    ``final_sinc_probability``: of that filter. Kernels, ranges and their shares are the published ones.

    Source: Wang et al., "Real-ESRGAN: training real-world blind super-resolution with pure synthetic data", arXiv
    2107.10833.
    """

    kind: Literal["real_esrgan"] = "real_esrgan"
    first: Stage = Stage()
    second: Stage = Stage(
        blur_probability=0.8,
        blur_sigma=(0.2, 1.5),
        resize_probability=(0.3, 0.4),
        resize_range=(0.3, 1.2),
        noise_sigma=(1.0, 25.0),
        poisson_scale=(0.05, 2.5),
    )
    final_sinc_probability: float = Field(0.8, ge=0, le=1)

    def __call__(self, picture: Tensor, scale: int, generator: torch.Generator) -> Tensor:
        draw = _Draw(generator)
        size = (picture.shape[-2] // scale, picture.shape[-1] // scale)
        x = jpeg(_spoiled(picture, self.first, picture.shape[-2:], draw), draw.integer(self.first.jpeg_quality))
        x = _spoiled(x, self.second, size, draw)
        quality, filters = draw.integer(self.second.jpeg_quality), draw.chance(self.final_sinc_probability)
        kernel = _sinc(draw.choice(self.second.kernel_sizes), draw) if filters else None
        compressed_first = draw.chance(0.5)
        if compressed_first:
            x = jpeg(x, quality)
        x = _resize(x, size, draw.choice(_RESIZES))
        x = (x if kernel is None else _blur(x, kernel)).clamp(0, 1)
        return x if compressed_first else jpeg(x, quality)


Degradation = Annotated[Resize | RealESRGAN, Field(discriminator="kind")]


class _Draw:
    """Scalars from one generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def integer(self, ends: tuple[int, int]) -> int:
        return min(int(self.uniform(ends[0], ends[1] + 1)), ends[1])

    def choice(self, options: Sequence, weights: Sequence[float] | None = None):
        point, total = self.uniform(), 0.0
        for option, weight in zip(options, weights or [1 / len(options)] * len(options), strict=True):
            total += weight
            if point < total:
                return option
        return options[-1]


def _spoiled(x: Tensor, stage: Stage, like: Sequence[int], draw: _Draw) -> Tensor:
    """Blur, resizing to a multiple of ``like`` and noise."""
    if draw.chance(stage.blur_probability):
        side = draw.choice(stage.kernel_sizes)
        x = _blur(x, _sinc(side, draw) if draw.chance(stage.sinc_probability) else _bell(side, stage.blur_sigma, draw))
    up, down = stage.resize_probability
    low, high = stage.resize_range
    kind = draw.choice(("up", "down", "keep"), (up, down, 1 - up - down))
    factor = {"up": (1.0, max(high, 1.0)), "down": (min(low, 1.0), 1.0), "keep": (1.0, 1.0)}[kind]
    zoom = draw.uniform(*factor)
    x = _resize(x, [max(1, round(side * zoom)) for side in like], draw.choice(_RESIZES))
    grey = draw.chance(stage.grey_probability)
    if draw.chance(stage.gaussian_probability):
        shape = (1, *x.shape[1:]) if grey else x.shape
        noise = torch.randn(shape, generator=draw.generator) * (draw.uniform(*stage.noise_sigma) / 255)
    else:
        noise = _poisson(x.mean(0, keepdim=True) if grey else x, draw) * draw.uniform(*stage.poisson_scale)
    return (x + noise).clamp(0, 1)


def _poisson(x: Tensor, draw: _Draw) -> Tensor:
    """The noise of counting photons, as many as the picture has grey levels, rounded up to a power of two."""
    levels = (x.clamp(0, 1) * 255).round()
    photons = 2 ** math.ceil(math.log2(max(2, len(levels.unique()))))
    return torch.poisson(levels / 255 * photons, generator=draw.generator) / photons - levels / 255


def _grid(side: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(side, dtype=torch.float64) - side // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _bell(side: int, sigma: Range, draw: _Draw) -> Tensor:
    """A (generalised) Gaussian ``exp(-r^(2 b) / 2)`` or plateau ``1 / (1 + r^(2 b))`` of elliptic radius ``r``."""
    kind, isotropic = draw.choice(tuple(_KERNELS), tuple(_KERNELS.values()))
    wide = draw.uniform(*sigma)
    narrow, angle = (wide, 0.0) if isotropic else (draw.uniform(*sigma), draw.uniform(-math.pi, math.pi))
    power = 1.0
    if kind != "gaussian":
        high = 4.0 if kind == "generalised" else 2.0
        low = 0.5 if kind == "generalised" else 1.0
        power = draw.uniform(low, 1.0) if draw.chance(0.5) else draw.uniform(1.0, high)
    x, y = _grid(side)
    along = (x * math.cos(angle) + y * math.sin(angle)) / wide
    across = (y * math.cos(angle) - x * math.sin(angle)) / narrow
    radius = (along.square() + across.square()) ** power
    return 1 / (1 + radius) if kind == "plateau" else torch.exp(-radius / 2)


def _sinc(side: int, draw: _Draw) -> Tensor:
    """The circular low-pass filter ``w J1(w r) / (2 pi r)``, which rings along edges."""
    cutoff = draw.uniform(math.pi / (3 if side < 13 else 5), math.pi)
    x, y = _grid(side)
    radius = (x.square() + y.square()).sqrt()
    centre = radius == 0
    values = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius.where(~centre, 1.0))
    return values.where(~centre, cutoff**2 / (4 * math.pi))


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    half = kernel.shape[-1] // 2
    # Repeated borders, since a small picture has not enough pixels to mirror.
    padded = F.pad(x[:, None], (half,) * 4, mode="replicate")
    return F.conv2d(padded, (kernel / kernel.sum()).to(x)[None, None])[:, 0]


def _resize(x: Tensor, size: Sequence[int], mode: str, *, antialias: bool = False) -> Tensor:
    if mode == "area":
        return F.interpolate(x[None], size=list(size), mode=mode)[0]
    return F.interpolate(x[None], size=list(size), mode=mode, align_corners=False, antialias=antialias)[0]


def jpeg(picture: Tensor, quality: int) -> Tensor:
    """``picture`` ``(3 or 1, H, W)`` in [0, 1] after libjpeg at ``quality`` 1 to 100, by Pillow."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as image:
        decoded = np.array(image, dtype=np.float32)
    return torch.from_numpy(decoded).view(*picture.shape[1:], -1).permute(2, 0, 1) / 255
