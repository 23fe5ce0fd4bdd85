"""What a perfect generator would score: the metrics between two disjoint halves of the real images."""

from collections.abc import Sequence

import torch

from genkit.eval.metrics.base import FeatureSet, Metric, get_metric
from genkit.rng import hash_seed


def real_halves(
    real: FeatureSet, metrics: Sequence[str | Metric] = ("frechet",), *, splits: int = 8, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation, over random splits, of each value between two disjoint halves of ``real``.

    A half has n/2 images, so its Frechet distance carries about twice the bias of a comparison at n. Split ``i`` is a
    function of ``(seed, i)``.

    Raises:
        ValueError: fewer than 2 splits, fewer than 4 images, or features not kept.
    """
    if splits < 2:
        raise ValueError(f"splits={splits}: expected at least 2")
    n = real.stats.n
    if n is None or n < 4:
        raise ValueError(f"two halves need at least 4 images, got n={n}")
    chosen = [get_metric(metric) for metric in metrics]
    values: dict[str, list[float]] = {}
    for i in range(splits):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(hash_seed(seed, i)))
        first, second = real.subset(order[: n // 2]), real.subset(order[n // 2 : n // 2 * 2])
        for metric in chosen:
            for name, value in metric(first, second).items():
                values.setdefault(name, []).append(value)
    series = {name: torch.tensor(of, dtype=torch.float64) for name, of in values.items()}
    return {name: (of.mean().item(), of.std().item()) for name, of in series.items()}
