"""Samples with a verdict on each: accepted, rejected, or a score between."""

import torch
from pydantic import Field, model_validator
from torch import Tensor

from genkit.data.base import Source, SourceConfig
from genkit.data.transfer import Named


class FeedbackConfig(SourceConfig):
    """Whose samples, and how their scores become verdicts; with neither rule they are verdicts in [0, 1] already."""

    samples: Named = Field(description="source of samples with scores: pairs or image_folder, its settings beside it")
    threshold: float | None = Field(default=None, description="accept a sample whose score is at least this")
    low: float | None = Field(default=None, description="score of a verdict 0; those below count as this")
    high: float | None = Field(default=None, description="score of a verdict 1; those above count as this")

    @model_validator(mode="after")
    def _one_rule(self):
        if (self.low is None) != (self.high is None):
            raise ValueError(f"low={self.low} and high={self.high} must be set together")
        if self.low is not None and self.threshold is not None:
            raise ValueError(
                f"threshold={self.threshold} and low={self.low} to high={self.high} are two rules; set one"
            )
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        return self

    def verdicts(self, scores: Tensor) -> Tensor:
        """``o`` in [0, 1], of scores ``(N,)``."""
        if self.threshold is not None:
            return (scores >= self.threshold).to(scores)
        if self.low is not None and self.high is not None:
            return ((scores - self.low) / (self.high - self.low)).clamp(0, 1)
        strange = scores[(scores < 0) | (scores > 1)]
        if len(strange):
            raise ValueError(
                f"scores from {scores.min():.4g} to {scores.max():.4g} are no verdicts in [0, 1]; set threshold, or "
                "low and high"
            )
        return scores


class Feedback(Source):
    """Samples of another source with ``score`` ``(B,)``, the verdict ``o`` in [0, 1] on each, and its ``share``.

    ``2 o - 1`` is 1 for what was accepted and -1 for what was rejected. ``share`` is the mean over all samples of the
    positive part of ``2 o - 1`` where an item's is positive, and of the negative part where it is negative: dividing by
    it makes both groups weigh the same, without any item's weight depending on its batch. ``accepted`` is the share of
    verdicts above 1/2.

    Raises:
        ValueError: samples without scores, scores that are no verdicts, or none above 1/2: that would be unlearning
            alone.
    """

    Config = FeedbackConfig

    def __init__(self, **settings):
        super().__init__(**settings)
        self.inner: Source = self.config.samples.make("data.samples.name")
        self.shape, self.num_classes, self.length = self.inner.shape, self.inner.num_classes, self.inner.length
        scores = known_scores(self.inner, self.config.samples.name)
        self.verdicts = self.config.verdicts(scores)
        sign = 2 * self.verdicts.double() - 1
        if not bool((sign > 0).any()):
            raise ValueError(
                f"data={self.config.samples.name}: none of {len(sign)} samples is accepted; the scores go from "
                f"{scores.min():.4g} to {scores.max():.4g}"
            )
        self.accepted = (sign > 0).double().mean().item()
        shares = torch.where(sign > 0, sign.clamp(min=0).mean(), sign.clamp(max=0).neg().mean())
        self.shares = torch.where(sign == 0, 1.0, shares).float()

    def check_network(self, network):
        self.inner.check_network(network)

    def read(self, records, items):
        batch = self.inner.read(records, items)
        batch.pop("eps", None)
        return {**batch, "score": self.verdicts[records], "share": self.shares[records]}


def known_scores(source: Source, name: str) -> Tensor:
    """The scores of a source.

    Raises:
        ValueError: it has none.
    """
    scores = source.scores()
    if scores is None:
        raise ValueError(
            f"data.samples={name!r} has no scores; accepted is image_folder with a score in every line of its "
            "metadata.jsonl, or pairs made by `genkit pairs --reward`"
        )
    return scores
