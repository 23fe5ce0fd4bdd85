"""CMMD: the discrepancy of two sets of CLIP embeddings under a Gaussian kernel.

arXiv 2401.09603.
"""

import torch
from torch import Tensor

from genkit.eval.metrics._mmd import squared_mmd
from genkit.eval.metrics._rows import checked_pair
from genkit.eval.metrics.base import FeatureSet, Metric


def cmmd(reference: Tensor, generated: Tensor, *, sigma: float = 10.0, unbiased: bool = False) -> float:
    """``1000 (E k(x, x') + E k(y, y') - 2 E k(x, y))``, ``k(x, y) = exp(-|x - y|^2 / (2 sigma^2))``.

    Rows ``(n, d)`` and ``(m, d)`` are divided by their lengths first, as the embeddings of the published number are
    (those of CLIP ViT-L/14 at 336 pixels). As published, each row is also paired with itself: for two sets of n of one
    law the value is then about ``2000 (1 - E k) / n``. ``unbiased`` leaves those pairs out and may be negative.

    Raises:
        ValueError: no rows, or fewer than 2 if ``unbiased``; unequal d; a row not finite, or zero, so that it has no
            direction; a ``sigma`` that is not positive.

    Source: Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation", arXiv
    2401.09603, eq. 4.
    """
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma={sigma}: expected a positive number")
    x, y = checked_pair(reference, generated, 1 + unbiased, "CMMD")
    x, y = (_unit(side, rows) for side, rows in (("reference", x), ("generated", y)))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp((a @ b.T - 1) / sigma**2)  # |a - b|^2 = 2 - 2 a.b

    return 1000 * squared_mmd(x, y, kernel, unbiased=unbiased)


def _unit(side: str, rows: Tensor) -> Tensor:
    length = rows.norm(dim=1, keepdim=True)
    if len(rows) and not length.min() > 0:
        raise ValueError(f"{side} set: feature row {int(length.argmin())} is zero and has no direction")
    return rows / length


class CMMD(Metric):
    """``cmmd``; lower is better. Settings are those of :func:`cmmd`."""

    better = {"cmmd": "lower"}
    reads_reference = ("features",)
    reads_generated = ("features",)
    by_default = False  # made for the embeddings of CLIP

    def __init__(self, sigma: float = 10.0, unbiased: bool = False):
        self.sigma, self.unbiased = sigma, unbiased

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        assert reference is not None and reference.features is not None and generated.features is not None
        return {"cmmd": cmmd(reference.features, generated.features, sigma=self.sigma, unbiased=self.unbiased)}
