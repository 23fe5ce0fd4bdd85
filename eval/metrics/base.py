"""What a metric is: a function of a generated set, and mostly of a reference set, that declares what it reads."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from genkit.eval.statistics import FeatureStats
from genkit.registry import lookup, members

PACKAGE = "genkit.eval.metrics"


@dataclass(frozen=True)
class FeatureSet:
    """What is known of one set of n images.

    ``features`` ``(n, d)`` and ``logits`` ``(n, K)`` as the extractor gave them; ``labels`` ``(n,)`` the classes the
    images were asked for. Saved statistics have none of the three.
    """

    stats: FeatureStats
    features: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None

    @property
    def fields(self) -> set[str]:
        """The names of what is known."""
        return {name for name, value in vars(self).items() if value is not None}

    def subset(self, indices: Tensor) -> "FeatureSet":
        """The same of some images only. Raises ``ValueError`` where the features themselves were not kept."""
        if self.features is None:
            raise ValueError("a subset needs the features; measure(..., keep=True) keeps them")
        features = self.features[indices]
        stats = FeatureStats(features.shape[1]).update(features)
        stats.meta = dict(self.stats.meta)
        logits, labels = (None if rows is None else rows[indices] for rows in (self.logits, self.labels))
        return FeatureSet(stats, features, logits, labels)


class Metric(ABC):
    """A named measurement; constructor arguments are its settings, kept as attributes and recorded in results.

    ``reads_reference`` and ``reads_generated`` list the fields of ``FeatureSet`` that a metric needs of each side; a
    metric that reads nothing of the reference needs none. Randomness, if any, comes from a private generator.
    """

    reads_reference: ClassVar[tuple[str, ...]] = ("stats",)
    reads_generated: ClassVar[tuple[str, ...]] = ("stats",)

    @abstractmethod
    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        """Named values; names are the field's and unique over all metrics."""

    def missing(self, reference: Collection[str], generated: Collection[str]) -> list[str]:
        """What this metric would need beyond the fields that either side has, in words."""
        sides = (("reference", reference, self.reads_reference), ("generated", generated, self.reads_generated))
        return [f"{side} {field}" for side, has, needs in sides for field in needs if field not in has]


def get_metric(metric: "str | Metric") -> Metric:
    """A metric as it is, or with default settings the one whose file in ``eval/metrics`` bears this name."""
    if isinstance(metric, Metric):
        return metric
    return lookup(PACKAGE, Metric, metric, setting="metrics")()


def metric_name(metric: Metric) -> str:
    """The name of the file the metric is defined in."""
    return type(metric).__module__.rpartition(".")[2]


def all_metrics() -> list[Metric]:
    """Every metric there is, with default settings."""
    return [cls() for cls in members(PACKAGE, Metric).values()]
