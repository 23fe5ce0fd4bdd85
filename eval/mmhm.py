"""MMHM: one number from metrics that pull in different directions, to choose among settings of few-step models.

arXiv 2603.14186, version 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Direction = Literal["min", "max"]
Bounds = dict[str, dict[str, float]]

METRICS: dict[str, Direction] = {"fid": "min", "inception_score": "max", "clip_score": "max", "pick_score": "max"}


@dataclass(frozen=True)
class MMHM:
    """Scores ``(M,)``, normalised metrics ``(M, K)`` as they entered the mean, bounds, and which rows lie outside."""

    scores: NDArray[np.float64]
    normalised: NDArray[np.float64]
    bounds: Bounds
    outside: NDArray[np.bool_]


@dataclass(frozen=True)
class Stability:
    """``share`` of the rows other than the winner that can be left out without another winner; ``None`` of one row.

    ``changes`` has, for each of the others, the row that wins without it.
    """

    share: float | None
    changes: dict[int, int]


def mmhm(
    columns: Mapping[str, Sequence[float]],
    *,
    metrics: Mapping[str, Direction] = METRICS,
    bounds: Mapping[str, Mapping[str, float]] | None = None,
    weights: Mapping[str, float] | None = None,
    eps: float = 1e-3,
    clip: bool = True,
) -> MMHM:
    """Harmonic mean of min-max normalised metrics: ``sum_k w_k / sum_k w_k / (eps + u_k(m))`` for row ``m``.

    With ``lo_k`` and ``hi_k`` the bounds of metric ``k``, ``u_k = (z_k - lo_k) / (hi_k - lo_k)``, or
    ``(hi_k - z_k) / (hi_k - lo_k)`` where lower is better, and 1 where ``hi_k == lo_k``. The best possible value is
    ``1 + eps``, the worst ``eps``: of equal weights a row that is worst in one of K metrics has at most about
    ``K eps``. As published are the four default metrics, weights of 1 and ``eps=1e-3``.

    The bounds are those of all rows given, so scores of two tables do not compare, and a row that is no candidate can
    change which wins. With stored bounds neither holds, but rows may lie outside: they are flagged, and ``clip`` keeps
    their u in ``[0, 1]``. The published code does not clip; there a row at ``u = -eps`` scores 0, worse ones score
    anything, also more than good rows.

    Args:
        columns: values by metric, M each; others than ``metrics`` names are not read.
        metrics: what enters, and whether low (``"min"``) or high (``"max"``) is better.
        bounds: ``{metric: {"min": lo, "max": hi}}``, as in the result of an earlier call; of the rows by default.
        weights: by metric, above 0; 1 where not named.
        clip: only with ``bounds``.

    Raises:
        ValueError: no metric or row, a column that is missing or of another length, a value that is not finite (row
            and column named, rows counted from 1), a direction, weight, bound or ``eps`` that is not accepted.

    Source: "Fair Benchmarking of Emerging One-Step Generative Models Against Multistep Diffusion and Flow Models",
    arXiv 2603.14186, version 1 of March 2026; later versions, retitled, no longer name this score in the abstract.
    """
    z = _matrix(columns, metrics)
    if not (eps > 0 and np.isfinite(eps)):
        raise ValueError(f"eps={eps}: expected a number above 0")
    if bounds is None and not clip:
        raise ValueError("clip=False: without bounds there is nothing to clip; give bounds, or leave clip")
    lo, hi = (z.min(axis=0), z.max(axis=0)) if bounds is None else _checked_bounds(bounds, metrics)
    with np.errstate(over="ignore"):
        span = hi - lo
    if not np.isfinite(span).all():
        raise ValueError(f"the range of {list(metrics)[int(np.argmin(np.isfinite(span)))]!r} exceeds float64")
    lower = np.array([direction == "min" for direction in metrics.values()])
    gain = np.where(lower, hi - z, z - lo)
    u = np.divide(gain, span, out=np.ones_like(z), where=span > 0)
    if bounds is not None and clip:
        u = u.clip(0, 1)
    w = _checked_weights(weights or {}, metrics)
    with np.errstate(divide="ignore"):  # without clipping u may be -eps, whose published score is 0
        scores = w.sum() / (w / (eps + u)).sum(axis=1)
    used = {name: {"min": float(a), "max": float(b)} for name, a, b in zip(metrics, lo, hi, strict=True)}
    return MMHM(scores, u, used, np.any((z < lo) | (z > hi), axis=1))


def pareto_front(
    columns: Mapping[str, Sequence[float]], metrics: Mapping[str, Direction] = METRICS
) -> NDArray[np.bool_]:
    """Which rows ``(M,)`` no other row beats: as good in every metric and better in one. Equal rows stay together.

    Raises:
        ValueError: as ``mmhm``.
    """
    z = _matrix(columns, metrics) * np.array([-1 if direction == "min" else 1 for direction in metrics.values()])
    return np.array([not ((z >= row).all(axis=1) & (z > row).any(axis=1)).any() for row in z])


def ranking(scores: NDArray[np.float64], *ties: Sequence[float]) -> list[int]:
    """Rows from best to worst; equal scores by each of ``ties`` in turn, lower first, and at last by their order.

    The published choice is the first of the best; by network calls, then by guidance scale, it is the cheapest.
    Scores that agree to 12 digits are equal: the last bits depend on the order of summation.
    """
    keys = [(-comparable(score), *(tie[i] for tie in ties), i) for i, score in enumerate(scores)]
    return sorted(range(len(scores)), key=keys.__getitem__)


def comparable(score: float) -> float:
    """A score without the digits that rounding makes."""
    return float(f"{score:.12g}")


def stability(
    columns: Mapping[str, Sequence[float]],
    *ties: Sequence[float],
    metrics: Mapping[str, Direction] = METRICS,
    bounds: Mapping[str, Mapping[str, float]] | None = None,
    weights: Mapping[str, float] | None = None,
    eps: float = 1e-3,
    clip: bool = True,
) -> Stability:
    """Whether the winner still wins when each other row in turn is left out, and with it its part in the bounds.

    ``ties`` are as in ``ranking``, the rest as in ``mmhm``. With stored ``bounds`` rows do not touch each other, and
    the share is 1.
    """

    def order(rows: list[int]) -> list[int]:
        kept = {name: [columns[name][i] for i in rows] for name in metrics}
        scores = mmhm(kept, metrics=metrics, bounds=bounds, weights=weights, eps=eps, clip=clip).scores
        return [rows[i] for i in ranking(scores, *([tie[i] for i in rows] for tie in ties))]

    _matrix(columns, metrics)
    every = list(range(len(columns[next(iter(metrics))])))
    winner = order(every)[0]
    others = [i for i in every if i != winner]
    winners = {i: order([j for j in every if j != i])[0] for i in others}
    changes = {i: new for i, new in winners.items() if new != winner}
    return Stability(1 - len(changes) / len(others) if others else None, changes)


def _matrix(columns: Mapping[str, Sequence[float]], metrics: Mapping[str, Direction]) -> NDArray[np.float64]:
    if not metrics:
        raise ValueError("metrics: none is named")
    for name, direction in metrics.items():
        if direction not in ("min", "max"):
            raise ValueError(f"metrics: {name}={direction!r}; accepted are 'min', where low is better, and 'max'")
    missing = [name for name in metrics if name not in columns]
    if missing:
        raise ValueError(f"missing columns: {', '.join(missing)}. There are: {', '.join(columns) or 'none'}")
    lengths = {name: len(columns[name]) for name in metrics}
    if len(set(lengths.values())) > 1 or not min(lengths.values()):
        raise ValueError(f"columns of {lengths} rows: expected as many of each, at least 1")
    z = np.array([columns[name] for name in metrics], dtype=np.float64).T
    for row, k in np.argwhere(~np.isfinite(z)):
        raise ValueError(f"row {row + 1}, column {list(metrics)[k]!r}: {z[row, k]} is not a finite number")
    return z


def _checked_bounds(
    bounds: Mapping[str, Mapping[str, float]], metrics: Mapping[str, Direction]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if set(bounds) != set(metrics):
        raise ValueError(f"bounds of {', '.join(sorted(bounds)) or 'nothing'}: expected {', '.join(sorted(metrics))}")
    for name, bound in bounds.items():
        if not isinstance(bound, Mapping) or set(bound) != {"min", "max"}:
            raise ValueError(f"bounds: {name}={bound!r}; expected {{'min': number, 'max': number}}")
        if not all(isinstance(v, (int, float)) and np.isfinite(v) for v in bound.values()) or not (
            bound["min"] <= bound["max"]
        ):
            raise ValueError(f"bounds: {name}={dict(bound)}; expected finite numbers, min at most max")
    lo, hi = (np.array([bounds[name][side] for name in metrics], dtype=np.float64) for side in ("min", "max"))
    return lo, hi


def _checked_weights(weights: Mapping[str, float], metrics: Mapping[str, Direction]) -> NDArray[np.float64]:
    for name, weight in weights.items():
        if name not in metrics:
            raise ValueError(f"weights: {name!r} is not among the metrics {', '.join(metrics)}")
        if not (weight > 0 and np.isfinite(weight)):
            raise ValueError(f"weights: {name}={weight}; expected a number above 0 (leave the metric out instead of 0)")
    return np.array([weights.get(name, 1.0) for name in metrics], dtype=np.float64)
