"""What a metric is: a function of a generated set, and mostly of a reference set, that declares what it reads."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from genkit.eval import by_name
from genkit.eval.inputs import ImageSet, Maker
from genkit.eval.statistics import FeatureStats
from genkit.registry import members

PACKAGE = "genkit.eval.metrics"

_SAID = {"model": "images that a model makes meanwhile, as of pipeline:FOLDER or reconstructed:FOLDER"}
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class FeatureSet:
    """What is known of one set of n images.

    ``features`` ``(n, d)`` and ``logits`` ``(n, K)`` as the extractor gave them; ``labels`` ``(n,)`` the classes the
    images were asked for, ``prompts`` the n texts; ``images`` the images themselves, read when asked for; ``model``
    what makes them, where that is known. Saved statistics have none of these.
    """

    stats: FeatureStats
    features: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    images: ImageSet | None = None
    prompts: Sequence[str] | None = None
    model: Maker | None = None

    @property
    def fields(self) -> set[str]:
        """The names of what is known."""
        return {name for name, value in vars(self).items() if value is not None}

    @property
    def n(self) -> int | None:
        """How many images; None of statistics that do not say."""
        known = [x for x in (self.features, self.logits, self.labels, self.prompts) if x is not None]
        return self.images.n if self.images is not None else len(known[0]) if known else self.stats.n

    def subset(self, indices: Tensor) -> "FeatureSet":
        """The same of some images only. Raises ``ValueError`` where the features themselves were not kept."""
        if self.features is None:
            raise ValueError("a subset needs the features; measure(..., keep=True) keeps them")
        stats = FeatureStats(self.features.shape[1]).update(self.features[indices])
        stats.meta = dict(self.stats.meta)
        return replace(self.rows(indices), stats=stats)

    def rows(self, indices: Tensor) -> "FeatureSet":
        """What is known of some images, beside the statistics of all."""
        features, logits, labels = (
            None if rows is None else rows[indices] for rows in (self.features, self.logits, self.labels)
        )
        images = None if self.images is None else self.images.subset(indices)
        prompts = None if self.prompts is None else [self.prompts[i] for i in indices.tolist()]
        return FeatureSet(self.stats, features, logits, labels, images, prompts, self.model)


class Metric(ABC):
    """A named measurement; constructor arguments are its settings, kept as attributes and recorded in results.

    Randomness, if any, comes from a private generator.

    Attributes:
        reads_reference, reads_generated: the fields of ``FeatureSet`` that a metric needs of each side; one that reads
            nothing of the reference needs none.
        paired: whether it compares row i with row i.
        by_default: whether it is among those that are computed where none are named.
        argument: the one setting without default, where there is one: the metric is then named ``file:value``.
        better: of its values those that tables and reports show, and which way each is better, None where neither way
            is (:mod:`genkit.eval.directions` reads it).
    """

    reads_reference: tuple[str, ...] = ("stats",)
    reads_generated: tuple[str, ...] = ("stats",)
    paired: ClassVar[bool] = False
    by_default: ClassVar[bool] = True
    argument: ClassVar[str | None] = None
    better: ClassVar[Mapping[str, Better | None]] = {}

    @property
    def name(self) -> str:
        """What results call it: the name of the file it is defined in."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its values: the attributes that the constructor made, without those that begin with ``_``."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and not hasattr(Metric, k)}

    @abstractmethod
    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        """Named values; names are the field's and unique over all metrics."""

    def check(self, reference: "ImageSet | FeatureSet | None", generated: "ImageSet | FeatureSet | None") -> None:
        """Raise ``ValueError`` for what is seen to be wrong with the sides before anything is measured, or made."""
        return

    def of_halves(self) -> "Metric":
        """What of it intervals are made of, on halves of the sets: all, unless its settings are of whole ones."""
        return self

    def beware(self, reference: FeatureSet | None, generated: FeatureSet) -> list[str]:
        """What to know about its values on these sides, for the notes of a result."""
        return []

    def missing(self, reference: Collection[str], generated: Collection[str]) -> list[str]:
        """What this metric would need beyond the fields that either side has, in words."""
        sides = (("reference", reference, self.reads_reference), ("generated", generated, self.reads_generated))
        absent = [(side, field) for side, has, needs in sides for field in needs if field not in has]
        return [f"{side} {_SAID.get(field, field)}" for side, field in absent]


def get_metric(metric: "str | Metric") -> Metric:
    """A metric as it is, or the one whose file in ``eval/metrics`` bears this name, with settings after a colon.

    A metric that cannot do without an argument takes it after the colon alone: ``reward:clip_score``; others take
    ``key=value``: ``kid:subset_size=100,subsets=50``.

    Raises:
        ValueError: there is none of this name; a setting is unknown or missing.
    """
    if isinstance(metric, Metric):
        return metric
    return by_name.make(PACKAGE, Metric, metric, setting="metrics")


def all_metrics() -> list[Metric]:
    """Every metric that needs no argument, with default settings."""
    return [cls() for cls in members(PACKAGE, Metric).values() if not cls.argument]
