"""DISTS of pairs of images."""

from pathlib import Path

import torch
from torch import Tensor

from genkit import perceptual
from genkit.eval.extractors.base import file_hash
from genkit.eval.metrics._per_image import PerPair


def load(vgg: str) -> tuple[perceptual.DISTS, str]:
    """The distance on the VGG16 of :meth:`genkit.perceptual.DISTS.load`, and what it is made of, for the protocol:

    file and hash, and whether the weights of channels are the published ones or equal, which that depends on.
    """
    made = perceptual.DISTS.load(vgg)
    file = vgg if vgg == perceptual.TORCHVISION else f"{Path(vgg).name}/{file_hash(Path(vgg))}"
    return made, f"{file}/{'equal' if bool((made.alpha == 1).all()) else 'learned'}"


class DISTS(PerPair):
    """``dists``, the mean over pairs of :class:`genkit.perceptual.DISTS`; lower is better.

    Images i of both sides must belong together.

    Args:
        vgg: weights of VGG16: a file, or ``torchvision``, as :meth:`genkit.perceptual.DISTS.load` takes them.
        device: where it is computed.

    Raises:
        FileNotFoundError: no such file.

    Source: Ding et al., "Image quality assessment: unifying structure and texture similarity", arXiv 2004.07728.
    """

    better = {"dists": "lower"}
    argument = "vgg"

    def __init__(self, vgg: str, device: torch.device | str = "cpu"):
        self._device = device
        self._distance, self.vgg = load(vgg)
        self._distance.to(device)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return self._distance(x.float().to(self._device), y.float().to(self._device))
