"""Handwritten digits, 8 x 8, embedded in scikit-learn: 1,797 images of ten classes, no download."""

import torch

from genkit.data.base import Source


class Digits(Source):
    """scikit-learn's digits: ``x0`` ``(B, 1, 8, 8)`` in [-1, 1] (17 grey levels), ``class_labels`` the digit.

    Source: "Optical recognition of handwritten digits", UCI machine learning repository (the test set).
    """

    shape = (1, 8, 8)
    num_classes = 10

    def __init__(self, **settings):
        super().__init__(**settings)
        from sklearn.datasets import load_digits  # slow to import: looking up another source must not pay

        data = load_digits()
        self.images = torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
        self.labels = torch.as_tensor(data.target, dtype=torch.int64)
        self.length = len(self.images)

    def read(self, records, items):
        return {"x0": self.images[records], "class_labels": self.labels[records]}
