"""LPIPS of pairs of images."""

from pathlib import Path

import torch
from torch import Tensor

from genkit import perceptual
from genkit.eval.extractors.base import file_hash
from genkit.eval.metrics._per_image import PerPair


class LPIPS(PerPair):
    """``lpips``, the mean over pairs of :class:`genkit.perceptual.LPIPS`; lower is better.

    Images i of both sides must belong together. Network, hash of its weights, and whether those of the channels are the
    learned ones are part of the protocol: values of different networks are not comparable.

    Args:
        backbone: weights of the classifier: a file, or ``torchvision``, as :meth:`genkit.perceptual.LPIPS.load` takes
            them.
        net: which classifier that is: ``alex``, ``vgg`` or ``squeeze``.
        device: where it is computed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another network, or a file of another one.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924.
    """

    better = {"lpips": "lower"}
    argument = "backbone"

    def __init__(self, backbone: str, net: perceptual.Net = "alex", device: torch.device | str = "cpu"):
        self.net, self._device = net, device
        self._distance = perceptual.LPIPS.load(net, backbone).to(device)
        file = backbone if backbone == perceptual.TORCHVISION else f"{Path(backbone).name}/{file_hash(Path(backbone))}"
        self.backbone = f"{file}/{'learned' if self._distance.learned else 'equal'}"

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return self._distance(x.float().to(self._device), y.float().to(self._device))
