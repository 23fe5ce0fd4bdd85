"""Inception Score: classes that are sure in every image and even over all of them.

arXiv 1606.03498.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from genkit.eval.metrics._rows import checked
from genkit.eval.metrics.base import FeatureSet, Metric
from genkit.rng import hash_seed


class InceptionScores(NamedTuple):
    """Mean and standard deviation over splits."""

    mean: float
    std: float


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> InceptionScores:
    """``exp(E_x KL(p(y|x) || p(y)))`` of each split of the shuffled rows, from 1 to the number of classes.

    ``logits`` ``(n, K)``; those of the published number are the 1008 of the 2015 Inception without its bias. Split i
    is rows ``i n / splits`` to ``(i + 1) n / splits`` after a shuffle by ``seed``. ``std`` divides by the number of
    splits, as the authors' code does. ``log p(y)`` is a log-sum-exp, so sure classes give 1 and never NaN.

    Raises:
        ValueError: fewer rows than splits, no split, a row not finite.

    Source: Salimans et al., "Improved Techniques for Training GANs", arXiv 1606.03498, section 4.
    """
    if splits < 1:
        raise ValueError(f"splits={splits}: expected at least 1")
    rows = checked("generated", logits, splits, f"the Inception Score with splits={splits}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(hash_seed(seed)))
    log_p = rows[order].log_softmax(1)
    edges = [i * len(rows) // splits for i in range(splits + 1)]
    scores = torch.stack([_score(log_p[a:b]) for a, b in zip(edges, edges[1:], strict=False)])
    return InceptionScores(scores.mean().item(), scores.std(correction=0).item())


def _score(log_p: Tensor) -> Tensor:
    log_marginal = log_p.logsumexp(0) - torch.tensor(len(log_p), dtype=log_p.dtype).log()
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()


class InceptionScore(Metric):
    """``inception_score`` and ``inception_score_std``; higher is better. Needs no reference."""

    better = {"inception_score": "higher"}
    reads_reference = ()
    reads_generated = ("logits",)
    by_default = False  # made for Inception's classes

    def __init__(self, splits: int = 10, seed: int = 0):
        self.splits, self.seed = splits, seed

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        assert generated.logits is not None
        score = inception_score(generated.logits, splits=self.splits, seed=self.seed)
        return {"inception_score": score.mean, "inception_score_std": score.std}
