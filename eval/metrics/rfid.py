"""The Frechet distance of reconstructions, rFID. arXiv 2406.06525 and others; FID: arXiv 1706.08500."""

from typing import Any

from genkit.eval.metrics.base import FeatureSet, Metric
from genkit.eval.metrics.frechet import FrechetDistance


class ReconstructionDistance(Metric):
    """``rfid``, lower is better: :mod:`genkit.eval.metrics.frechet` of images as an autoencoder gives them back.

    Published values have the very images as reference; against statistics of a training set they are twice as large
    (``matched`` of the protocol is ``images`` for the former). Under features that are not those of FID the name is
    ``reconstruction_`` and that of their distance.

    Raises:
        ValueError: a generated set that is not :func:`genkit.eval.reconstructed.reconstructed_images`.
    """

    by_default = False
    reads_generated = ("stats", "model")
    better = {"rfid": "lower", "reconstruction_frechet_distance": "lower"}

    def check(self, reference: Any, generated: Any) -> None:
        if generated.model.originals is None:
            raise ValueError(
                "metrics: 'rfid' is of reconstructions, and the generated images are none; take 'frechet', or "
                "reconstructed:AUTOENCODER as the generated side"
            )

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        self.check(reference, generated)
        name = generated.stats.meta.get("distance", "frechet_distance")
        value = FrechetDistance()(reference, generated)[name]
        return {f"r{name}" if name.startswith("fid") else f"reconstruction_{name}": value}
