"""DISTS of pairs of images."""

import torch
from torch import Tensor

from genkit import perceptual
from genkit.eval.metrics._per_image import PerPair


class DISTS(PerPair):
    """``dists``, the mean over pairs of :class:`genkit.perceptual.DISTS`; lower is better.

    Images i of both sides must belong together.

    Args:
        vgg: weights of VGG16, as :meth:`genkit.perceptual.DISTS.load` takes them.
        device: where it is computed.

    Raises:
        FileNotFoundError: no such file.

    Source: Ding et al., "Image quality assessment: unifying structure and texture similarity", arXiv 2004.07728.
    """

    argument = "vgg"

    def __init__(self, vgg: str, device: torch.device | str = "cpu"):
        self.vgg, self._device = vgg, device
        self._distance = perceptual.DISTS.load(vgg).to(device)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return self._distance(x.float().to(self._device), y.float().to(self._device))
