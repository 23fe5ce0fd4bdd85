"""Realism: how deep each generated image lies in the real ones.

arXiv 1904.06991.
"""

import torch
from torch import Tensor

from genkit.eval.metrics._per_image import PerImage
from genkit.eval.metrics._rows import checked, checked_pair
from genkit.eval.metrics.base import FeatureSet


def realism(reference: Tensor, generated: Tensor, *, k: int = 3, block: int = 1024) -> Tensor:
    """``R(y) = max_i r_k(x_i) / |y - x_i|`` of every generated ``y``: ``(n, d)``, ``(m, d)`` to ``(m,)``, float64.

    ``r_k(x_i)`` is the distance from ``x_i`` to its k-th neighbour in the reference, itself left out. Only ``x_i`` with
    a radius of at most the median count: those in sparse places, with large radii, would call anything realistic. From
    1 on, ``y`` lies in the ball of a real image; a copy of one has infinity, or 1 where its ball is a point.

    Raises:
        ValueError: k below 1, a reference of k or fewer rows, unequal d, features not finite.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", arXiv
    1904.06991, eq. 3 (section 5).
    """
    if k < 1:
        raise ValueError(f"k={k}: expected at least 1")
    x, y = checked_pair(reference, generated, 1, "realism")
    checked("reference", reference, k + 1, f"realism with k={k}")
    radii = torch.cat([_distances(rows, x).kthvalue(k + 1).values for rows in x.split(block)])
    dense = radii <= radii.median()
    x, radii = x[dense], radii[dense]
    best = torch.zeros(len(y), dtype=torch.float64)
    for rows, r in zip(x.split(block), radii.split(block), strict=True):
        ratio = r[:, None] / _distances(rows, y)
        best = torch.maximum(best, ratio.nan_to_num(nan=1.0, posinf=torch.inf).amax(0))
    return best


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


class Realism(PerImage):
    """``realism``, the mean over images; higher is better.

    Args:
        k: which neighbour makes the radius.
        most: of a larger reference so many rows, evenly spaced, are looked at: time grows with their square.
    """

    better = {"realism": "higher"}
    reads_reference = ("features",)
    reads_generated = ("features",)

    def __init__(self, k: int = 3, most: int = 10_000):
        if most <= k:
            raise ValueError(f"most={most}: expected more than k={k}")
        self.k, self.most = k, most

    def values(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, Tensor]:
        assert reference is not None and reference.features is not None and generated.features is not None
        x = reference.features
        if len(x) > self.most:
            x = x[torch.arange(self.most) * len(x) // self.most]
        return {"realism": realism(x, generated.features, k=self.k)}
