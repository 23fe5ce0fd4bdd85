"""How much a value would change with other samples: bootstrap confidence intervals."""

from typing import NamedTuple

import torch
from torch import Tensor

from genkit.eval.metrics._per_image import PerImage
from genkit.eval.metrics.base import FeatureSet, Metric, get_metric
from genkit.rng import hash_seed


class Interval(NamedTuple):
    """A value, what it lies between, and the standard error."""

    value: float
    low: float
    high: float
    standard_error: float


def bootstrap(
    metric: str | Metric,
    reference: FeatureSet | None,
    generated: FeatureSet,
    *,
    level: float = 0.95,
    resamples: int = 200,
    both: bool = False,
    seed: int = 0,
) -> dict[str, Interval]:
    """Each value of ``metric``, with the interval that covers it with probability ``level`` over generated samples.

    Values ``v*`` of resamples, n rows with replacement, give by their quantiles ``q`` the basic interval
    ``[2 v - q_high, 2 v - q_low]``. For a mean over images it is the usual one. A Frechet distance is biased by its
    sample size, and on a resample once more by as much: the basic interval takes that off, and estimates the value of
    many samples, while the quantiles themselves would lie above the value. Resample ``i`` is a function of ``(seed,
    i)``; of a metric that is a mean over images, images are measured once.

    Args:
        reference: used whole, as the fixed set that it is in tables; with ``both`` it is resampled, too. Where rows are
            pairs, pairs are resampled.

    Raises:
        ValueError: a level outside (0, 1), fewer than 2 resamples, a metric of neighbours, which repeated rows make
            meaningless, features that were not kept, ``both`` without a reference or with pairs.

    Source: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 5.2.
    """
    metric = get_metric(metric)
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a share between 0 and 1, as 0.95")
    if resamples < 2:
        raise ValueError(f"resamples={resamples}: expected at least 2")
    if not metric.bears_repeats:
        raise ValueError(
            f"{metric.name!r} looks at nearest neighbours, and a resample repeats rows; accepted are others"
        )
    if both and (reference is None or metric.paired):
        raise ValueError(f"both=True: {metric.name!r} has " + ("pairs" if metric.paired else "no reference"))
    if isinstance(metric, PerImage):
        return _of_means(metric, reference, generated, level, resamples, seed)
    n, m = (None if side is None else side.stats.n for side in (reference, generated))
    assert m is not None
    drawn: dict[str, list[float]] = {}
    for i in range(resamples):
        x = reference
        if both:
            assert reference is not None and n is not None
            x = reference.subset(_rows(n, hash_seed(seed, i, 1)))
        for name, value in metric(x, generated.subset(_rows(m, hash_seed(seed, i, 0)))).items():
            drawn.setdefault(name, []).append(value)
    values = metric(reference, generated)
    return {name: _interval(values[name], torch.tensor(of, dtype=torch.float64), level) for name, of in drawn.items()}


def _of_means(
    metric: PerImage, reference: FeatureSet | None, generated: FeatureSet, level: float, resamples: int, seed: int
) -> dict[str, Interval]:
    every = metric.every(reference, generated)
    n = len(next(iter(every.values())))
    rows = [_rows(n, hash_seed(seed, i, 0)) for i in range(resamples)]
    return {
        name: _interval(of.mean().item(), torch.stack([of[chosen].mean() for chosen in rows]), level)
        for name, of in every.items()
    }


def _rows(n: int, seed: int) -> Tensor:
    return torch.randint(n, (n,), generator=torch.Generator().manual_seed(seed))


def _interval(value: float, drawn: Tensor, level: float) -> Interval:
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = drawn.quantile(tails).tolist()
    return Interval(value, 2 * value - high, 2 * value - low, drawn.std().item())
