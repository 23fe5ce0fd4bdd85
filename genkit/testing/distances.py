"""Distances between samples, for tests and benchmarks whose truth is known."""

import torch
from torch import Tensor


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 256, seed: int = 0) -> float:
    """SW2: ``sqrt(mean over random unit directions a of W2(<a, x>, <a, y>)^2)``, in float64.

    In one dimension ``W2^2`` is the mean squared difference of the sorted samples. ``x`` and ``y`` have shape
    ``(n, *event)``; the directions depend on ``seed`` alone.

    Raises:
        ValueError: different shapes, or no samples.
    """
    if x.shape != y.shape or not x.numel():
        raise ValueError(f"x and y must be as many samples of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = (samples.detach().flatten(1).double() for samples in (x, y))
    directions = torch.randn(
        x.shape[1], projections, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(x.device)
    directions /= directions.norm(dim=0)
    x, y = ((samples @ directions).sort(0).values for samples in (x, y))
    return (x - y).square().mean().sqrt().item()
