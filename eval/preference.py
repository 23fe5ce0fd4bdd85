"""Which of two sets of images a score prefers, prompt by prompt."""

from typing import Any, NamedTuple

from torch import Tensor

from genkit.eval.inputs import read_images
from genkit.eval.metrics._per_image import PerImage
from genkit.eval.metrics.base import FeatureSet, get_metric
from genkit.eval.statistics import FeatureStats


class WinRate(NamedTuple):
    """``rate``: the first set's share of wins, a tie being half of one; ``standard_error`` of it, over prompts."""

    rate: float
    standard_error: float
    wins: int
    ties: int
    losses: int


def preferences(first: Tensor, second: Tensor, *, tie: float = 0.0) -> WinRate:
    """How often the first of two images wins, by their scores ``(n,)`` for the same n prompts.

    Two scores are probabilities by ``p = softmax(first, second)``; the first wins where ``p_1 - p_2 > tie``, loses
    where ``p_2 - p_1 > tie``, and else it is a tie. PickScores are logits, of which ``p`` is what its model says.

    Raises:
        ValueError: other shapes, scores that are not finite, a ``tie`` outside of [0, 1).

    Source: Kirstain et al., "Pick-a-Pic", arXiv 2305.01569.
    """
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError(f"scores of shapes {tuple(first.shape)} and {tuple(second.shape)}; accepted are (n,), n >= 1")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("scores that are not finite")
    if not 0 <= tie < 1:
        raise ValueError(f"tie={tie}: expected a difference of probabilities, 0 or more and below 1")
    # The difference of both probabilities, which cancels nothing where the scores are nearly equal.
    lead = ((first.double() - second.double()) / 2).tanh()
    won, lost = lead > tie, lead < -tie
    points = (1 + won.double() - lost.double()) / 2
    error = points.std(correction=1).item() / len(points) ** 0.5 if len(points) > 1 else float("nan")
    wins, losses = int(won.sum()), int(lost.sum())
    return WinRate(points.mean().item(), error, wins, len(points) - wins - losses, losses)


def win_rate(first: Any, second: Any, *, score: str | PerImage = "reward:pick_score", tie: float = 0.0) -> WinRate:
    """:func:`preferences` of two sets of images, image i of both being of one prompt, as ``read_images`` takes them.

    Args:
        score: a metric of each image by itself, of which more is better.
        tie: as in :func:`preferences`.

    Raises:
        ValueError: sets of other sizes or prompts, prompts that are missing, a metric of sets or pairs.
    """
    metric = get_metric(score)
    if not isinstance(metric, PerImage) or metric.reads_reference:
        raise ValueError(f"score={metric.name!r}: accepted is a metric of each image by itself, as reward:pick_score")
    sides = [_side(source) for source in (first, second)]
    names = [side.images.name for side in sides if side.images is not None]
    if sides[0].n != sides[1].n:
        raise ValueError(f"{names[0]} has {sides[0].n} images, {names[1]} {sides[1].n}; accepted are equal numbers")
    if "prompts" in metric.reads_generated:
        for side, name in zip(sides, names, strict=True):
            if side.prompts is None:
                raise ValueError(f"{metric.name!r} needs prompts, and {name} has none")
        if list(sides[0].prompts or ()) != list(sides[1].prompts or ()):
            raise ValueError(f"{names[0]} and {names[1]} are of other prompts, or in another order")
    (a,), (b,) = (metric.every(None, side).values() for side in sides)
    return preferences(a, b, tie=tie)


def _side(source: Any) -> FeatureSet:
    images = read_images(source)
    return FeatureSet(FeatureStats(0), labels=images.labels, images=images, prompts=images.prompts)
