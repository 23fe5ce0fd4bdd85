"""Resampling: from the weights of a group of particles to the ancestors of the next generation.

Every scheme is unbiased, ``E[copies of k] = K W_k``, never draws a particle of weight 0, and works on all groups at
once from uniform numbers that the caller gives: what a group draws does not depend on its neighbours.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from genkit.registry import unknown
from genkit.rng import ItemRNG

# K W_k of equal weights may round to just below an integer, which must count as that integer.
_SLACK = 1e-12


def resample(resampler: str, weights: Tensor, rng: ItemRNG) -> Tensor:
    """Ancestors ``(N, K)``, int64 in ``[0, K)``, of ``N`` groups of ``K`` particles, rising within a group.

    Args:
        resampler: ``systematic`` (points ``(u + j)/K`` with one ``u``: copies within 1 of ``K W``), ``stratified``
            (points ``(u_j + j)/K``), ``residual`` (``floor(K W)`` copies, the rest multinomial), ``multinomial``, or
            ``ssp`` (copies ``floor`` or ``ceil`` of ``K W``, by pairwise exchange of the fractions).
        weights: ``(N, K)`` float64, non-negative, with a positive finite sum; normalised here.
        rng: one row a group.

    Raises:
        ValueError: an unknown resampler, weights out of range, another number of rows in ``rng``.

    Source: Douc and Cappe, "Comparison of resampling schemes for particle filtering", arXiv cs/0507025; ``ssp``:
    Gerber, Chopin and Whiteley, "Negative association, ordering and convergence of resampling methods",
    arXiv 1707.01845, section 3.3.
    """
    check_resampler(resampler)
    if weights.ndim != 2 or len(rng) != len(weights):
        raise ValueError(f"weights of shape {tuple(weights.shape)} for {len(rng)} groups; expected ({len(rng)}, K)")
    total = weights.sum(1, keepdim=True)
    if not bool((weights >= 0).all() & (total > 0).all() & total.isfinite().all()):
        raise ValueError("weights must be at least 0 and have a positive, finite sum in every group")
    return RESAMPLERS[resampler](weights.double() / total, rng)


def check_resampler(resampler: str) -> None:
    """Raise ``ValueError`` for a name that is not one of :data:`RESAMPLERS`."""
    if resampler not in RESAMPLERS:
        raise ValueError(unknown("resampler", resampler, RESAMPLERS))


def inverse_cdf(weights: Tensor, points: Tensor) -> Tensor:
    """First index whose cumulative weight ``(N, K)`` lies strictly above each of ``points`` ``(N, P)`` in (0, 1)."""
    cumulative = weights.cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).clamp_(max=weights.shape[1] - 1)


def _strata(weights: Tensor, u: Tensor) -> Tensor:
    count = weights.shape[1]
    return inverse_cdf(weights, (u + torch.arange(count, dtype=u.dtype)) / count)


def _systematic(weights: Tensor, rng: ItemRNG) -> Tensor:
    return _strata(weights, rng.uniform((1,), dtype=torch.float64))


def _stratified(weights: Tensor, rng: ItemRNG) -> Tensor:
    return _strata(weights, rng.uniform((weights.shape[1],), dtype=torch.float64))


def _multinomial(weights: Tensor, rng: ItemRNG) -> Tensor:
    return inverse_cdf(weights, rng.uniform((weights.shape[1],), dtype=torch.float64).sort(1).values)


def _floor(weights: Tensor) -> tuple[Tensor, Tensor]:
    """``floor(K W)`` as int64 and the fractions left over."""
    scaled = weights * weights.shape[1]
    copies = (scaled + _SLACK).floor()
    return copies.long(), (scaled - copies).clamp_(min=0)


def _repeat(copies: Tensor) -> Tensor:
    n, count = copies.shape
    return torch.arange(count).repeat(n).repeat_interleave(copies.flatten()).view(n, count)


def _residual(weights: Tensor, rng: ItemRNG) -> Tensor:
    copies, fractions = _floor(weights)
    count = weights.shape[1]
    points = rng.uniform((count,), dtype=torch.float64)
    missing = count - copies.sum(1, keepdim=True)
    # Groups whose copies are whole have nothing to draw from; any positive numbers keep their (unused) draw defined.
    drawn = inverse_cdf(fractions.where(missing > 0, 1.0), points)
    wanted = (torch.arange(count) < missing).long()
    return _repeat(copies.scatter_add(1, drawn, wanted))


def _ssp(weights: Tensor, rng: ItemRNG) -> Tensor:
    copies, fractions = _floor(weights)
    n, count = weights.shape
    u = rng.uniform((count,), dtype=torch.float64)
    rows, held = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    for j in range(1, count):
        # Two fractions a, b exchange mass without bias until one of them is 0 or 1; the other one goes on.
        a, b = fractions[rows, held], fractions[:, j]
        down, up = torch.minimum(1 - b, a), torch.minimum(1 - a, b)
        falls = u[:, j] * (down + up) < up
        shift = torch.where(falls, -down, up)
        a, b = a + shift, b - shift
        fractions[rows, held], fractions[:, j] = a, b
        settled = (a < _SLACK) | (a > 1 - _SLACK)
        held = torch.where(settled, j, held)
    copies += (fractions > 0.5).long()
    # Rounding can leave the last fraction open; it belongs to whoever holds it.
    copies[rows, held] += count - copies.sum(1)
    return _repeat(copies)


RESAMPLERS: dict[str, Callable[[Tensor, ItemRNG], Tensor]] = {
    "systematic": _systematic,
    "stratified": _stratified,
    "residual": _residual,
    "multinomial": _multinomial,
    "ssp": _ssp,
}
