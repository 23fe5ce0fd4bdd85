"""No features: for metrics that read images alone."""

from torch import Tensor

from genkit.eval.extractors.base import Extractor, Features


class NoExtractor(Extractor):
    """Features of no dimensions, of images of any kind; metrics that read features are then not possible."""

    id = "none"
    dim = 0

    def __call__(self, images: Tensor) -> Features:
        return Features(images.new_zeros((len(images), 0)).float())
