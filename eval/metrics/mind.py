"""MIND: the squared distance that sorted projections of two feature sets have to travel.

arXiv 2605.06797.
"""

import torch
from torch import Tensor

from genkit.eval.metrics._rows import checked_pair
from genkit.eval.metrics.base import FeatureSet, Metric
from genkit.rng import hash_seed


def mind(reference: Tensor, generated: Tensor, *, directions: int = 1000, seed: int = 0) -> float:
    """``3 d`` times the mean squared 2-Wasserstein distance of projections on random unit vectors, ``>= 0``.

    The distance of one projection is the mean of squared differences of the sorted values. A shift by ``c`` gives
    ``3 |c|^2``; for two sets of n of one law the value is positive and falls as n grows, so compare equal n only.
    ``reference`` ``(n, d)`` and ``generated`` ``(m, d)``; of the larger set as many random rows are used as the smaller
    has. Directions and rows are functions of ``seed``.

    Raises:
        ValueError: fewer than 2 rows, unequal d, a row not finite, no directions.

    Source: Berthet et al., arXiv 2605.06797.
    """
    if directions < 1:
        raise ValueError(f"directions={directions}: expected at least 1")
    x, y = checked_pair(reference, generated, 2, "MIND")
    rows = torch.Generator().manual_seed(hash_seed(seed, 0))
    n = min(len(x), len(y))
    x, y = (s if len(s) == n else s[torch.randperm(len(s), generator=rows)[:n]] for s in (x, y))
    drawn = torch.randn(
        directions, x.shape[1], generator=torch.Generator().manual_seed(hash_seed(seed, 1)), dtype=torch.float64
    )
    total = 0.0
    for some in (drawn / drawn.norm(dim=1, keepdim=True)).split(64):  # 64 sorted columns of n in memory
        total += ((x @ some.T).sort(0).values - (y @ some.T).sort(0).values).square().sum().item()
    return 3 * x.shape[1] * total / (directions * n)


class MIND(Metric):
    """``mind``; lower is better. Settings are those of :func:`mind`."""

    better = {"mind": "lower"}
    reads_reference = ("features",)
    reads_generated = ("features",)
    by_default = False

    def __init__(self, directions: int = 1000, seed: int = 0):
        self.directions, self.seed = directions, seed

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        assert reference is not None and reference.features is not None and generated.features is not None
        value = mind(reference.features, generated.features, directions=self.directions, seed=self.seed)
        return {"mind": value}
