"""FID-infinity: the Frechet distance that would be measured with infinitely many samples.

arXiv 1911.07023.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from genkit.eval.metrics._rows import checked, checked_pair
from genkit.eval.metrics.base import FeatureSet, Metric
from genkit.eval.metrics.frechet import frechet_raw
from genkit.eval.statistics import FeatureStats
from genkit.rng import hash_seed


class Extrapolation(NamedTuple):
    """The line ``intercept + slope / n``; ``residual`` is the root mean square of what lies off it."""

    intercept: float
    slope: float
    residual: float


def frechet_infinity(
    reference: FeatureStats | Tensor,
    generated: Tensor,
    *,
    both: bool = False,
    sizes: int = 15,
    smallest: int | None = None,
    seed: int = 0,
) -> Extrapolation:
    """The intercept of a line fitted by least squares to the Frechet distance of n samples against 1 / n.

    Each of ``sizes`` values of n, evenly spaced from ``smallest`` (a tenth of all by default) to all, is measured on
    random rows of ``generated`` ``(m, d)``, a function of ``(seed, place)``. The bias of the reference, which is used
    whole, about ``(d + d(d+1)/4) / n``, is still in the intercept; with ``both``, n random rows of each side are used
    and it is not, but the intercept scatters more. It is not clamped, so it may be negative.

    Raises:
        ValueError: as ``frechet_distance``; fewer than 2 sizes, a ``smallest`` that is less than 2 or leaves no room
            for the sizes, a reference of statistics with ``both``.

    Source: Chong and Forsyth, "Effectively Unbiased FID and Inception Score and where to find them", arXiv 1911.07023,
    section 4.
    """
    if sizes < 2:
        raise ValueError(f"sizes={sizes}: expected at least 2")
    least = max(2, smallest or 2) + sizes - 1  # of so many rows, sizes different numbers can be taken
    why = f"FID-infinity with sizes={sizes}, smallest={smallest}"
    x: FeatureStats | Tensor
    if not both:
        y = checked("generated", generated, least, why)
        x = reference if isinstance(reference, FeatureStats) else checked("reference", reference, 2, why)
        if isinstance(x, Tensor) and len(x) >= x.shape[1]:
            x = FeatureStats(x.shape[1]).update(x)  # once for all sizes
        most = len(y)
    elif isinstance(reference, FeatureStats):
        raise ValueError("both=True draws from the reference, too: accepted are its features, not their statistics")
    else:
        x, y = checked_pair(reference, generated, least, why)
        most = min(len(x), len(y))
    low = max(most // 10, 2) if smallest is None else smallest
    if not 2 <= low <= most - sizes + 1:
        raise ValueError(f"smallest={low}: expected 2 to {most - sizes + 1}, {sizes} sizes below n={most}")
    counts = torch.linspace(low, most, sizes, dtype=torch.float64).round().long().tolist()
    values = []
    for place, n in enumerate(counts):
        some_x = _draw(x, n, hash_seed(seed, place, 0)) if both and isinstance(x, Tensor) else x
        values.append(frechet_raw(some_x, _draw(y, n, hash_seed(seed, place, 1))))
    inverse = 1 / torch.tensor(counts, dtype=torch.float64)
    design = torch.stack((torch.ones_like(inverse), inverse), 1)
    measured = torch.tensor(values, dtype=torch.float64)
    line = torch.linalg.lstsq(design, measured[:, None]).solution[:, 0]
    residual = (design @ line - measured).square().mean().sqrt()
    return Extrapolation(line[0].item(), line[1].item(), residual.item())


def _draw(rows: Tensor, n: int, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]]


class FrechetInfinity(Metric):
    """``frechet_infinity``, and the ``frechet_infinity_residual`` of the fit; lower is better.

    Settings are those of :func:`frechet_infinity`.
    """

    better = {"frechet_infinity": "lower"}
    reads_generated = ("features",)
    by_default = False

    def __init__(self, both: bool = False, sizes: int = 15, smallest: int | None = None, seed: int = 0):
        self.both, self.sizes, self.smallest, self.seed = both, sizes, smallest, seed
        self.reads_reference = ("features",) if both else ("stats",)

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        assert reference is not None and generated.features is not None
        x = reference.features if self.both else reference.stats
        assert x is not None
        fit = frechet_infinity(x, generated.features, **self.settings)
        return {"frechet_infinity": fit.intercept, "frechet_infinity_residual": fit.residual}
