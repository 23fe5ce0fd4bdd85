"""Metrics that are means over images, and with them over pairs of images."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from genkit.eval.inputs import ImageSet
from genkit.eval.metrics.base import FeatureSet, Metric
from genkit.eval.processes import gather, own

_BATCH = 64


class PerImage(Metric):
    """The mean over images of what :meth:`values` gives for each."""

    by_default = False
    reads_reference: tuple[str, ...] = ()
    reads_generated: tuple[str, ...] = ("images",)

    @abstractmethod
    def values(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, Tensor]:
        """Every value of every image, ``(n,)`` float64."""

    def every(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, Tensor]:
        """The same, each of several processes having made its share: for intervals, win rates, worst and best."""
        assert generated.n is not None
        rows = own(generated.n, _BATCH)
        if self.paired and reference is not None:
            self.check_pairs(reference, generated)
            reference = reference.rows(rows)
        made = self.values(reference, generated.rows(rows)) if len(rows) else {}
        shares = gather(made)
        return {name: torch.cat([share[name] for share in shares if share]) for name in next(filter(None, shares))}

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        return self.summary(self.every(reference, generated))

    def summary(self, every: dict[str, Tensor]) -> dict[str, float]:
        """What is said of all images together: the means."""
        return {name: of.mean().item() for name, of in every.items()}

    def check_pairs(self, reference: ImageSet | FeatureSet, generated: ImageSet | FeatureSet) -> None:
        """Raise ``ValueError`` unless both sides have as many images."""
        counts = reference.n, generated.n
        if counts[0] != counts[1]:
            raise ValueError(f"{self.name} pairs images: the reference has {counts[0]}, the generated set {counts[1]}")


class PerPair(PerImage):
    """The mean over pairs, image i of the one side with image i of the other."""

    paired = True
    reads_reference = ("images",)

    def check(self, reference: ImageSet | FeatureSet | None, generated: ImageSet | FeatureSet | None) -> None:
        assert reference is not None and generated is not None
        self.check_pairs(reference, generated)

    @abstractmethod
    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """``(B,)`` of two ``(B, C, H, W)``, float64 on [0, 1]."""

    def values(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, Tensor]:
        assert reference is not None and reference.images is not None and generated.images is not None
        self.check_pairs(reference, generated)
        parts = []
        for x, y in zip(batches(reference), batches(generated), strict=True):
            if x.shape != y.shape:
                raise ValueError(
                    f"{self.name} pairs images: those of the reference are {tuple(x.shape[1:])}, the generated ones "
                    f"{tuple(y.shape[1:])}"
                )
            with torch.no_grad():
                parts.append(self.value(x, y).double().cpu())
        return {self.name: torch.cat(parts)}


def batches(side: FeatureSet, size: int = _BATCH) -> Iterator[Tensor]:
    """The images, float64 on [0, 1], some at a time."""
    assert side.images is not None
    for batch in side.images.batches(size):
        yield batch.double() / 255
