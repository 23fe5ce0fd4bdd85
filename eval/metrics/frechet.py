"""Frechet distance between Gaussian fits of two feature sets (FID, with whichever features).

arXiv 1706.08500.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from genkit.eval.metrics._rows import checked
from genkit.eval.metrics.base import FeatureSet, Metric
from genkit.eval.statistics import FeatureStats


def frechet_distance(reference: FeatureStats | Tensor, generated: FeatureStats | Tensor) -> float:
    """FD = |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^{1/2}, never below 0.

    ``mu`` and ``S`` (divided by n - 1) are those of the features, given as ``FeatureStats`` or as rows ``(n, d)``.
    Rows give the same value, much faster when n < d. FD is biased upwards by about (2d + d(d+1)/2) / n for two sets of
    n: compare only values of equal n. A set of n < d is warned of.

    Raises:
        ValueError: n < 2, unequal d, rows not finite.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500, eq. 6.
    """
    return max(frechet_raw(reference, generated), 0.0)


def frechet_raw(reference: FeatureStats | Tensor, generated: FeatureStats | Tensor) -> float:
    """The same before clamping at 0: a clearly negative value would show lost digits."""
    x, y = _gaussian("reference", reference), _gaussian("generated", generated)
    if len(x.mean) != len(y.mean):
        raise ValueError(f"the reference has {len(x.mean)} feature dimensions, the generated set {len(y.mean)}")
    # (S_x S_y)^{1/2} has the trace that |G F^T| has as sum of singular values, with S_x = G^T G and S_y = F^T F: real,
    # never negative, symmetric in the sets, and true to rounding, where roots of eigenvalues are true to half of it.
    root = torch.linalg.svdvals(x.factor @ y.factor.T).sum()
    return float((x.mean - y.mean).square().sum() + x.trace + y.trace - 2 * root)


class _Gaussian(NamedTuple):
    """``factor`` F ``(k, d)``, k <= d, with S = F^T F, and the ``trace`` of S."""

    mean: Tensor
    trace: Tensor
    factor: Tensor


def _gaussian(side: str, given: FeatureStats | Tensor) -> _Gaussian:
    rows = None if isinstance(given, FeatureStats) else checked(side, given, 2, "a covariance")
    n, d = (given.n, given.dim) if isinstance(given, FeatureStats) else given.shape
    if n is not None and n < d:
        text = f"{side} set: n={n} < d={d}, its covariance is rank deficient and the distance inflated"
        warnings.warn(text, stacklevel=4)
    if rows is not None and len(rows) < d:
        factor = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
        return _Gaussian(rows.mean(0), factor.square().sum(), factor)
    stats = given if isinstance(given, FeatureStats) else FeatureStats(d).update(given)
    return _Gaussian(stats.mean, stats.covariance.trace(), _factor(stats.covariance))


def _factor(covariance: Tensor) -> Tensor:
    """By Cholesky where the rank is clearly full, else by the eigenvalues that are more than rounding noise.

    The root of noise would cost half the digits of a rank-deficient trace.
    """
    noise = len(covariance) * torch.finfo(covariance.dtype).eps
    upper, failed = torch.linalg.cholesky_ex(covariance, upper=True)
    pivots = upper.diagonal().square()
    if not failed and pivots.min() > 100 * noise * pivots.max():
        return upper
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > noise * values.max()
    return (vectors[:, kept] * values[kept].sqrt()).T


class FrechetDistance(Metric):
    """``frechet_distance``, under the name that it has with the extractor of the features (``fid`` ...), lower is
    better; and, for debugging, ``frechet_raw``.
    """

    better = {"frechet_distance": "lower"}

    def beware(self, reference: FeatureSet | None, generated: FeatureSet) -> list[str]:
        sides = (("reference", reference), ("generated", generated))
        return [
            f"the {role} set has fewer images ({n}) than feature dimensions ({side.stats.dim})"
            for role, side in sides
            if side is not None and (n := side.stats.n) is not None and n < side.stats.dim
        ]

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        assert reference is not None
        raw = frechet_raw(_shorter(reference), _shorter(generated))
        return {generated.stats.meta.get("distance", "frechet_distance"): max(raw, 0.0), "frechet_raw": raw}


def _shorter(side: FeatureSet) -> FeatureStats | Tensor:
    """Few rows where they are known, rather than their statistics."""
    rows = side.features
    return side.stats if rows is None or len(rows) >= side.stats.dim else rows
