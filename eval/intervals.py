"""How much a value would change with other samples: confidence intervals from random halves."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from genkit.eval.metrics._per_image import PerImage
from genkit.eval.metrics.base import FeatureSet, Metric, get_metric
from genkit.rng import hash_seed

_LEAST = 4


class Interval(NamedTuple):
    """A value, what it lies between, and the standard error."""

    value: float
    low: float
    high: float
    standard_error: float


def intervals(
    metric: str | Metric,
    reference: FeatureSet | None,
    generated: FeatureSet,
    *,
    level: float = 0.95,
    halves: int = 200,
    both: bool = False,
    seed: int = 0,
) -> dict[str, Interval]:
    """Each value of ``metric``, with the interval that covers, with probability ``level`` over generated samples, what
    the value would be on average over sets of as many.

    Where the variance of a value falls as ``1 / n``, as ``s^2 / n``, that of a random half without replacement about
    the value ``v`` of all is ``s^2 / (n/2) - s^2 / n``: half-samples are off from ``v`` as ``v`` is from its mean. With
    ``v*`` the values of halves and ``q`` their quantiles the interval is
    ``[v - (q_high - mean v*), v - (q_low - mean v*)]``. Centring by ``mean v*`` takes off what a half is biased more
    than the whole, so it is an interval for the value at this n, bias included, which is what tables compare, and holds
    its own value. No row is repeated: pair statistics without bias, such as KID, stay so, and nearest neighbours mean
    what they do. Where variance falls faster (two sets of one law under KID or the Frechet distance) the interval is
    too wide; of an odd n, whose halves have ``(n - 1) / 2``, by a share of about ``1 / n``.

    With fewer than ``2 / (1 - level) - 1`` halves, 39 for 95 %, it reaches from the lowest to the highest, too little.

    Half ``i`` is a function of ``(seed, i)``; of a metric that is a mean over images, images are measured once.
    Settings that ask for a number of rows may be too much for halves: see ``Metric.of_halves``.

    Args:
        reference: used whole, as the fixed set that it is in tables; with ``both`` it is halved, too. Where rows are
            pairs, pairs are drawn.

    Raises:
        ValueError: a level outside (0, 1), fewer than 2 halves, a side with fewer than 4 rows or too few for the metric
            to have half of them, a metric of a model rather than of images, features that were not kept, ``both``
            without a reference or with pairs.

    Sources: Politis and Romano, "Large sample confidence regions based on subsamples under minimal assumptions", 1994;
    Shao and Wu, "A general theory for jackknife variance estimation", 1989 (the delete-half jackknife).
    """
    metric = get_metric(metric).of_halves()
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a share between 0 and 1, as 0.95")
    if halves < 2:
        raise ValueError(f"halves={halves}: expected at least 2")
    if "model" in metric.reads_generated:
        raise ValueError(f"{metric.name!r} is of the model that makes the images, and other images would not change it")
    if both and (reference is None or metric.paired):
        raise ValueError(f"both=True: {metric.name!r} has " + ("pairs" if metric.paired else "no reference"))
    for role, side in (("reference", reference if both else None), ("generated", generated)):
        if side is not None and (side.n or 0) < _LEAST:
            raise ValueError(f"the {role} set has n={side.n}: an interval from halves needs at least {_LEAST}")
    if isinstance(metric, PerImage):
        return _of_means(metric, reference, generated, level, halves, seed)
    values = metric(reference, generated)
    drawn: dict[str, list[float]] = {}
    with warnings.catch_warnings():  # that a half has fewer rows than dimensions is not the user's doing
        warnings.filterwarnings("ignore", ".*rank deficient")
        for i in range(halves):
            x = _half(reference, hash_seed(seed, i, 1)) if both and reference is not None else reference
            for name, value in metric(x, _half(generated, hash_seed(seed, i, 0))).items():
                drawn.setdefault(name, []).append(value)
    return {name: _interval(values[name], torch.tensor(of, dtype=torch.float64), level) for name, of in drawn.items()}


def _of_means(
    metric: PerImage, reference: FeatureSet | None, generated: FeatureSet, level: float, halves: int, seed: int
) -> dict[str, Interval]:
    every = metric.every(reference, generated)
    n = len(next(iter(every.values())))
    rows = [_rows(n, hash_seed(seed, i, 0)) for i in range(halves)]
    return {
        name: _interval(of.mean().item(), torch.stack([of[chosen].mean() for chosen in rows]), level)
        for name, of in every.items()
    }


def _half(side: FeatureSet, seed: int) -> FeatureSet:
    assert side.n is not None
    return side.subset(_rows(side.n, seed))


def _rows(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2]


def _interval(value: float, drawn: Tensor, level: float) -> Interval:
    off, count = drawn - drawn.mean(), len(drawn)
    # Of k values the i-th smallest has on average i / (k + 1) of the law below it.
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = off.quantile(((tails * (count + 1) - 1) / (count - 1)).clamp(0, 1)).tolist()
    return Interval(value, value - high, value - low, off.std().item())
