"""Pictures of any source, each with what a degradation leaves of it at a lower resolution."""

from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from genkit.data.base import SeededConfig, Source
from genkit.data.degradation import Degradation, RealESRGAN
from genkit.registry import lookup
from genkit.rng import ItemRNG


class SuperResolutionConfig(SeededConfig):
    """Which pictures, and how they are spoiled."""

    source: dict[str, Any] = Field(description="the source of the pictures, as {name: digits, ...its settings}")
    crop_size: int | None = Field(
        default=None, ge=1, description="side of a square cut out of each picture, at a place drawn per visit"
    )
    scale: int = Field(default=4, ge=2, description="how many times smaller low is, in height and in width")
    degradation: Degradation = Field(default=RealESRGAN(), description="{kind: real_esrgan or resize, ...}")

    @field_validator("source")
    @classmethod
    def _known(cls, value):
        settings = dict(value)
        if not isinstance(settings.get("name"), str):
            raise ValueError("name is missing; accepted is the name of a source and its settings")
        inner = lookup("genkit.data", Source, settings.pop("name"), setting="source.name")
        if inner is SuperResolution:
            raise ValueError("a source of pairs cannot be paired again; name a source of pictures")
        inner.Config(**settings)
        return value

    @model_validator(mode="after")
    def _divides(self):
        for name, size in (("crop_size", self.crop_size), ("source.size", self.source.get("size"))):
            if isinstance(size, int) and size % self.scale and (self.crop_size is None or name == "crop_size"):
                raise ValueError(f"{name}={size} is not a multiple of scale={self.scale}")
        return self


class SuperResolution(Source):
    """What the source inside reads, and ``low`` ``(B, C, H / scale, W / scale)`` in [-1, 1], made of its ``x0``.

    Cut and degradation of an item hang on its number alone: batches, workers and processes do not change them, and
    every visit of a picture draws others.

    Raises:
        ValueError: a source that gives no pictures, or pictures that the scale does not divide.
    """

    Config = SuperResolutionConfig

    def __init__(self, **settings):
        super().__init__(**settings)
        inner = dict(self.config.source)
        name = inner.pop("name")
        self.pictures: Source = lookup("genkit.data", Source, name, setting="source.name")(**inner)
        shape, scale, crop = self.pictures.shape, self.config.scale, self.config.crop_size
        if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"source={name!r} gives samples of shape {shape}; accepted are pictures (1 or 3, H, W)")
        if crop is not None:
            if crop > min(shape[1:]):
                raise ValueError(f"crop_size={crop}: source={name!r} gives pictures of {shape[1]} x {shape[2]}")
            shape = (shape[0], crop, crop)
        if shape[1] % scale or shape[2] % scale:
            raise ValueError(f"scale={scale} does not divide the pictures of {shape[1]} x {shape[2]}")
        self.shape, self.num_classes, self.length = shape, self.pictures.num_classes, self.pictures.length

    def read(self, records, items):
        batch = self.pictures.read(records, items)
        rng = self.rng(items)
        x0 = self._cropped(batch["x0"], rng)
        low = [
            self.config.degradation(picture, self.config.scale, generator)
            for picture, generator in zip((x0 + 1) / 2, rng.generators(), strict=True)
        ]
        return {**batch, "x0": x0, "low": torch.stack(low) * 2 - 1}

    def _cropped(self, x0: Tensor, rng: ItemRNG) -> Tensor:
        crop = self.config.crop_size
        if crop is None:
            return x0
        places = [rng.integers(side - crop + 1).tolist() for side in x0.shape[-2:]]
        cut = [x[:, i : i + crop, j : j + crop] for x, i, j in zip(x0, *places, strict=True)]
        return torch.stack(cut)
