"""Pictures of any source, each with what a degradation leaves of it at a lower resolution."""

from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from genkit.data.base import SeededConfig, Source
from genkit.data.degradation import Degradation, RealESRGAN
from genkit.registry import lookup


class SuperResolutionConfig(SeededConfig):
    """Which pictures, and how they are spoiled."""

    source: dict[str, Any] = Field(description="the source of the pictures, as {name: digits, ...its settings}")
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
        size = self.source.get("size")
        if isinstance(size, int) and size % self.scale:
            raise ValueError(f"source.size={size} is not a multiple of scale={self.scale}")
        return self


class SuperResolution(Source):
    """What the source inside reads, and ``low`` ``(B, C, H / scale, W / scale)`` in [-1, 1], made of its ``x0``.

    The degradation of an item hangs on its number alone: batches, workers and processes do not change it, and every
    visit of a picture draws another.

    Raises:
        ValueError: a source that gives no pictures, or pictures that the scale does not divide.
    """

    Config = SuperResolutionConfig

    def __init__(self, **settings):
        super().__init__(**settings)
        inner = dict(self.config.source)
        name = inner.pop("name")
        self.pictures: Source = lookup("genkit.data", Source, name, setting="source.name")(**inner)
        shape, scale = self.pictures.shape, self.config.scale
        if shape is None or len(shape) != 3 or shape[0] not in (1, 3) or shape[1] % scale or shape[2] % scale:
            raise ValueError(
                f"source={name!r} gives samples of shape {shape}; accepted are pictures (1 or 3, H, W), H and W "
                f"multiples of scale={scale}"
            )
        self.shape, self.num_classes, self.length = shape, self.pictures.num_classes, self.pictures.length

    def read(self, records, items):
        batch = self.pictures.read(records, items)
        generators = self.rng(items).generators()
        low = [
            self.config.degradation(picture, self.config.scale, generator)
            for picture, generator in zip((batch["x0"] + 1) / 2, generators, strict=True)
        ]
        return {**batch, "low": torch.stack(low) * 2 - 1}
