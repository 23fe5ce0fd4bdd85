"""Precision and recall, density and coverage: k-nearest-neighbour balls around features.

arXiv 1904.06991 and 2002.09797.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from genkit.eval.metrics._rows import checked_pair
from genkit.eval.metrics.base import FeatureSet, Metric


class PRDC(NamedTuple):
    """Precision, recall, density and coverage of one generated set."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(reference: Tensor, generated: Tensor, *, pr_k: int = 3, dc_k: int = 5, block: int = 1024) -> PRDC:
    """Precision, recall, density and coverage of features ``generated`` (m, d) against ``reference`` (n, d).

    With r_k(x_i) the distance from x_i to its k-th neighbour in its own set, itself left out:
    precision = share of y with some x_i: |y - x_i| <= r_k(x_i); recall = the same with the sets exchanged;
    density = #{(i, j): |y_j - x_i| < r_k(x_i)} / (k m); coverage = share of x_i with some y_j: |y_j - x_i| < r_k(x_i).
    For two sets of n from one law density is 1 and coverage 1 - prod_{i<k} (n - i) / (2n - 1 - i).

    ``pr_k`` is k of precision and recall, ``dc_k`` of density and coverage; distances are made in blocks of ``block``
    rows. Distances are float64 and never by way of |x|^2 + |y|^2 - 2 x.y, which misorders near-duplicates.

    Raises:
        ValueError: a set of k or fewer rows, unequal d, features not finite.

    Sources: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", arXiv
    1904.06991, eq. 1-2; Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", arXiv
    2002.09797, eq. 3-4.
    """
    k = max(pr_k, dc_k)
    if min(pr_k, dc_k) < 1:
        raise ValueError(f"pr_k={pr_k}, dc_k={dc_k}: expected at least 1 of each")
    x, y = checked_pair(reference, generated, k + 1, f"k={k}")
    x_pr, x_dc = _radii(x, (pr_k, dc_k), block)
    (y_pr,) = _radii(y, (pr_k,), block)
    inside_x = torch.zeros(len(y), dtype=torch.bool)  # y_j in some ball of x
    recalled = covered = pairs = 0
    for start in range(0, len(x), block):
        part = slice(start, start + block)
        distance = _distances(x[part], y)
        inside_x |= (distance <= x_pr[part, None]).any(0)
        recalled += int((distance <= y_pr).any(1).sum())
        within = distance < x_dc[part, None]
        pairs += int(within.sum())
        covered += int(within.any(1).sum())
    return PRDC(int(inside_x.sum()) / len(y), recalled / len(x), pairs / (dc_k * len(y)), covered / len(x))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x: Tensor, ks: tuple[int, ...], block: int) -> list[Tensor]:
    """For each k the distance from every row to its k-th neighbour; index 0 of a sorted row is the row itself."""
    nearest = [_distances(rows, x).topk(max(ks) + 1, largest=False, sorted=True).values for rows in x.split(block)]
    return [torch.cat(nearest)[:, k] for k in ks]


class PrecisionRecallDensityCoverage(Metric):
    """``precision``, ``recall``, ``density``, ``coverage``; higher is better, density may exceed 1."""

    better = {"precision": "higher", "recall": "higher", "density": "higher", "coverage": "higher"}
    reads_reference = ("features",)
    reads_generated = ("features",)

    def __init__(self, pr_k: int = 3, dc_k: int = 5):
        self.pr_k, self.dc_k = pr_k, dc_k

    def beware(self, reference: FeatureSet | None, generated: FeatureSet) -> list[str]:
        n, m = (None if side is None else side.stats.n for side in (reference, generated))
        return [] if n == m else [f"{n} real and {m} generated images: recall and coverage depend on both counts"]

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        assert reference is not None and reference.features is not None and generated.features is not None
        return prdc(reference.features, generated.features, pr_k=self.pr_k, dc_k=self.dc_k)._asdict()
