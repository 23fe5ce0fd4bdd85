"""Frechet distance between Gaussian fits of two feature sets (FID, with whichever features)."""

import warnings

import torch
from torch import Tensor

from genkit.eval.metrics.base import FeatureSet, Metric
from genkit.eval.statistics import FeatureStats


def frechet_distance(reference: FeatureStats | Tensor, generated: FeatureStats | Tensor) -> float:
    """FD = |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^{1/2}, never below 0.

    ``mu`` and ``S`` (divided by n - 1) are those of the features, given as ``FeatureStats`` or as rows ``(n, d)``.
    Rows give the same value, much faster when n < d. FD is biased upwards by about (2d + d(d+1)/2) / n for two sets of
    n: compare only values of equal n.

    Raises:
        ValueError: n < 2, unequal d, rows not finite.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500, eq. 6.
    """
    return max(frechet_raw(reference, generated), 0.0)


def frechet_raw(reference: FeatureStats | Tensor, generated: FeatureStats | Tensor) -> float:
    """The same before clamping at 0: a clearly negative value would show lost digits."""
    sets = (reference, generated)
    x, y = (s if isinstance(s, FeatureStats) else FeatureStats(s.shape[-1]).update(s) for s in sets)
    if x.dim != y.dim:
        raise ValueError(f"the reference has {x.dim} feature dimensions, the generated set {y.dim}")
    cov_x, cov_y = x.covariance, y.covariance
    for name, stats in (("reference", x), ("generated", y)):
        if stats.n is not None and stats.n < stats.dim:
            text = (
                f"{name} set: n={stats.n} < d={stats.dim}, its covariance is rank deficient and the distance inflated"
            )
            warnings.warn(text, stacklevel=2)
    if isinstance(reference, Tensor) and isinstance(generated, Tensor) and max(len(reference), len(generated)) < x.dim:
        trace = _sqrt_trace_of_rows(reference, generated)
    else:
        trace = _sqrt_trace(cov_x, cov_y)
    return float((x.mean - y.mean).square().sum() + cov_x.trace() + cov_y.trace() - 2 * trace)


def _sqrt_trace(cov_x: Tensor, cov_y: Tensor) -> Tensor:
    """tr (S_x S_y)^{1/2} as tr (A S_y A)^{1/2}, A = S_x^{1/2}: symmetric, so real and non-negative."""
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * _cut(values).sqrt()) @ vectors.T
    return _cut(torch.linalg.eigvalsh(root @ cov_y @ root)).sqrt().sum()


def _cut(eigenvalues: Tensor) -> Tensor:
    """Rounding noise set to zero: its square root would cost half the digits of a rank-deficient trace."""
    floor = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.max()
    return torch.where(eigenvalues > floor, eigenvalues, 0.0)


def _sqrt_trace_of_rows(x: Tensor, y: Tensor) -> Tensor:
    """The same from centred rows, n < d: the nuclear norm of X Y^T / sqrt((n - 1)(m - 1)), an n x m matrix."""
    x, y = (rows.detach().to("cpu", torch.float64) for rows in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return torch.linalg.matrix_norm(x @ y.T, "nuc") / ((len(x) - 1) * (len(y) - 1)) ** 0.5


class FrechetDistance(Metric):
    """``frechet_distance`` and, for debugging, ``frechet_raw``; lower is better."""

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        assert reference is not None
        x, y = reference.features, generated.features
        raw = frechet_raw(reference.stats, generated.stats) if x is None or y is None else frechet_raw(x, y)
        return {"frechet_distance": max(raw, 0.0), "frechet_raw": raw}
