"""Edge-aware DISTS of pairs of images."""

import torch
from torch import Tensor

from genkit import perceptual
from genkit.eval.metrics._per_image import PerPair
from genkit.eval.metrics.dists import load


class EADISTS(PerPair):
    """``ea_dists``, the mean over pairs of :class:`genkit.perceptual.EADISTS`; lower is better.

    Images i of both sides must belong together.

    Args:
        vgg: weights of VGG16: a file, or ``torchvision``, as :meth:`genkit.perceptual.DISTS.load` takes them.
        padding: of the edge maps, ``zeros`` or ``reflect``.
        device: where it is computed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another padding.

    Source: Li et al., "Distillation-free one-step diffusion for real-world image super-resolution", arXiv 2410.04224.
    """

    better = {"ea_dists": "lower"}
    argument = "vgg"

    def __init__(self, vgg: str, padding: perceptual.Padding = "zeros", device: torch.device | str = "cpu"):
        self.padding, self._device = padding, device
        distance, self.vgg = load(vgg)
        self._distance = perceptual.EADISTS(distance, padding).to(device)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return self._distance(x.float().to(self._device), y.float().to(self._device))
