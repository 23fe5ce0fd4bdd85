"""Eight Gaussians on a circle: the 2-D toy whose exact denoiser is known (``genkit.testing.oracles``)."""

import math

import torch

from genkit.data.base import SeededConfig, Source

RADIUS = 2.0
STD = 0.3


def centres() -> torch.Tensor:
    """The eight unit vectors at angles ``k pi / 4``, float64, shape ``(8, 2)``."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return torch.stack((angle.cos(), angle.sin()), dim=1)


class EightGaussians(Source):
    """Endless 2-D points: a component drawn evenly, ``x0 = 2 (cos, sin)(k pi / 4) + 0.3 noise``; the class is ``k``."""

    Config = SeededConfig
    shape = (2,)
    num_classes = 8

    def read(self, records, items):
        rng = self.rng(items)
        component = rng.integers(8)
        return {"x0": (centres() * RADIUS).float()[component] + STD * rng.normal((2,)), "class_labels": component}
