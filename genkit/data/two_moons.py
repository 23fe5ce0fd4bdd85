"""Two interleaved half circles: a 2-D toy of two curved classes."""

import math

import torch
from pydantic import Field

from genkit.data.base import SeededConfig, Source


class TwoMoonsConfig(SeededConfig):
    """Settings of the two moons."""

    noise: float = Field(default=0.1, ge=0, description="standard deviation of the noise across the curves")


class TwoMoons(Source):
    """Endless 2-D points on half circles of radius 2: class 0 above, centred at (-1, -0.5), class 1 below, at (1, 0.5).

    ``x0 = centre + 2 (cos a, sin a) + noise``, the angle uniform on (0, pi) for class 0 and on (pi, 2 pi) for class 1.
    """

    Config = TwoMoonsConfig
    shape = (2,)
    num_classes = 2

    def read(self, records, items):
        rng = self.rng(items)
        moon = rng.integers(2)
        angle = math.pi * (rng.uniform() + moon)
        centre = (2 * moon - 1)[:, None] * torch.tensor([1.0, 0.5])
        curve = 2 * torch.stack((angle.cos(), angle.sin()), dim=1)
        return {"x0": centre + curve + self.config.noise * rng.normal((2,)), "class_labels": moon}
