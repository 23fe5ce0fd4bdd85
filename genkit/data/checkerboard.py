"""The 4 x 4 checkerboard on [-2, 2]^2: a 2-D toy with sharp edges."""

import torch

from genkit.data.base import SeededConfig, Source


class Checkerboard(Source):
    """Endless 2-D points, uniform on eight unit squares.

    Those are ``[i, i+1) x [j, j+1)`` with ``i + j`` even, -2 <= i, j < 2. The class is the square, row by row from
    the lower left.
    """

    Config = SeededConfig
    shape = (2,)
    num_classes = 8

    def read(self, records, items):
        rng = self.rng(items)
        square = rng.integers(8)
        row = square // 2
        column = 2 * (square % 2) + row % 2
        corner = torch.stack((column, row), dim=1) - 2
        return {"x0": corner + rng.uniform((2,)), "class_labels": square}
