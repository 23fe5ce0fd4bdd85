"""Class accuracy: does the extractor's classifier see the class that was asked for?"""

from torch import Tensor

from genkit.eval.metrics._rows import checked
from genkit.eval.metrics.base import FeatureSet, Metric


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is at the label. ``logits`` ``(n, K)``, ``labels`` ``(n,)`` in 0..K-1.

    Raises:
        ValueError: no rows, unequal lengths, a row of logits that is not finite, or a label out of range.
    """
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels) or not len(labels):
        raise ValueError(f"logits (n, K) and labels (n,), n >= 1: got {tuple(logits.shape)} and {tuple(labels.shape)}")
    checked("generated", logits, 1, "class accuracy")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"labels are {low}..{high}, but the classifier knows 0..{logits.shape[1] - 1}")
    return (logits.argmax(1) == labels).double().mean().item()


class Accuracy(Metric):
    """``class_accuracy`` of the generated images; needs the labels they were asked for, and no reference."""

    better = {"class_accuracy": "higher"}
    reads_reference = ()
    reads_generated = ("logits", "labels")

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        assert generated.logits is not None and generated.labels is not None
        return {"class_accuracy": class_accuracy(generated.logits, generated.labels)}
