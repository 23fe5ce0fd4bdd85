"""Kernel Inception distance: the discrepancy of two feature sets under a cubic kernel, without bias.

arXiv 1801.01401.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from genkit.eval.metrics._mmd import squared_mmd
from genkit.eval.metrics._rows import checked_pair
from genkit.eval.metrics.base import FeatureSet, Metric
from genkit.rng import hash_seed


class KIDSubsets(NamedTuple):
    """Mean and standard deviation over random subsets, and the error that the mean has for being over so few."""

    mean: float
    std: float
    standard_error: float


def kid(reference: Tensor, generated: Tensor) -> float:
    """``E k(x, x') + E k(y, y') - 2 E k(x, y)``, ``k(x, y) = (x.y/d + 1)^3``, over all pairs of different rows.

    ``reference`` is ``(n, d)``, ``generated`` ``(m, d)``. Its expectation does not depend on n and m; for two sets of
    one law it is 0, so it may be negative. Costs n^2 + m^2 + n m kernel values, a block of them in memory.

    Raises:
        ValueError: fewer than 2 rows, unequal d, a row not finite.

    Source: Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401, section 4.
    """
    x, y = checked_pair(reference, generated, 2, "KID")
    return squared_mmd(x, y, _cubic, unbiased=True)


def kid_subsets(
    reference: Tensor, generated: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KIDSubsets:
    """The same of ``subsets`` random subsets of ``subset_size`` rows of each side: what tables of KID show.

    ``std`` divides by the number of subsets, as other libraries do. It is the spread of KID at ``subset_size``;
    ``standard_error``, ``std`` over the root of ``subsets``, is that of ``mean`` as an estimate of the KID of these two
    sets, not of their laws. Subset ``i`` is a function of ``(seed, i)``.

    Raises:
        ValueError: as ``kid``; sets of fewer than ``subset_size`` rows; fewer than 2 subsets, or of fewer than 2 rows.
    """
    if subsets < 2 or subset_size < 2:
        raise ValueError(f"subsets={subsets}, subset_size={subset_size}: expected at least 2 of each")
    x, y = checked_pair(reference, generated, subset_size, f"KID with subset_size={subset_size}")
    values = []
    for i in range(subsets):
        generator = torch.Generator().manual_seed(hash_seed(seed, i))
        some_x, some_y = (rows[torch.randperm(len(rows), generator=generator)[:subset_size]] for rows in (x, y))
        values.append(squared_mmd(some_x, some_y, _cubic, unbiased=True))
    std, mean = torch.std_mean(torch.tensor(values, dtype=torch.float64), correction=0)
    return KIDSubsets(mean.item(), std.item(), std.item() / subsets**0.5)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


class KernelInceptionDistance(Metric):
    """``kid`` over all pairs, and ``kid_subsets_mean``, ``_std``, ``_standard_error``; lower is better.

    Settings are those of :func:`kid_subsets`; ``subsets=0`` leaves these out.

    Raises:
        ValueError: a ``subset_size`` for no subsets.
    """

    better = {"kid": "lower"}
    reads_reference = ("features",)
    reads_generated = ("features",)
    by_default = False  # of little use, or refused, for sets as small as a subset

    def __init__(self, subsets: int = 100, subset_size: int = 1000, seed: int = 0):
        if subsets == 0 and (subset_size, seed) != (1000, 0):
            raise ValueError(f"subsets=0: subset_size={subset_size} and seed={seed} have no effect; leave them out")
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def of_halves(self) -> "KernelInceptionDistance":
        return KernelInceptionDistance(subsets=0)  # half a set may be smaller than a subset

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        assert reference is not None and reference.features is not None and generated.features is not None
        x, y = reference.features, generated.features
        if self.subsets == 0:
            return {"kid": kid(x, y)}
        parts = kid_subsets(x, y, subsets=self.subsets, subset_size=self.subset_size, seed=self.seed)
        return {"kid": kid(x, y), **{f"kid_subsets_{name}": value for name, value in parts._asdict().items()}}
