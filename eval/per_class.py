"""What an evaluation says of each class by itself."""

import warnings
from collections.abc import Mapping

from torch import Tensor

from genkit.eval.metrics.base import FeatureSet
from genkit.eval.metrics.frechet import frechet_distance


def per_class(
    reference: FeatureSet | None, generated: FeatureSet, scores: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Values by label, of the generated images that were asked for with that label; nothing where they have none.

    ``n_gen`` and ``n_real`` are how many images the class has. Where both sides have features and at least two images
    of the class, there is their Frechet distance, under the extractor's name for it: with few images a class it is far
    above that of all images, and compares only with classes of as many. ``class_accuracy`` is the share that the
    extractor's classifier recognises. ``scores`` are those of every image, ``(n,)``, and enter as their means.
    """
    if generated.labels is None:
        return {}
    found: dict[str, dict[str, float]] = {}
    for label in generated.labels.unique().tolist():
        rows = (generated.labels == label).nonzero().flatten()
        values: dict[str, float] = {"n_gen": len(rows)}
        if reference is not None and reference.labels is not None:
            real = (reference.labels == label).nonzero().flatten()
            values["n_real"] = len(real)
            if (
                reference.features is not None
                and generated.features is not None
                and min(len(real), len(rows)) > 1
                and generated.stats.dim
            ):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".*rank deficient", UserWarning)
                    distance = frechet_distance(reference.features[real], generated.features[rows])
                values[generated.stats.meta.get("distance", "frechet_distance")] = distance
        if generated.logits is not None and 0 <= label < generated.logits.shape[1]:
            values["class_accuracy"] = (generated.logits[rows].argmax(1) == label).double().mean().item()
        found[str(label)] = values | {name: of[rows].mean().item() for name, of in scores.items()}
    return found
