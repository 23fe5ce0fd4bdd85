"""How thick the strokes of a picture are."""

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.rewards.base import Prompts, Reward


class Thickness(Reward):
    """Twice the ink over the length of its outline, in pixels: ``2 sum p / sum |grad p|``, of bright strokes on dark.

    A stroke of width ``w`` and length ``L`` has the area ``w L`` and an outline of about ``2 L``; the outline of a
    picture with grey levels is its total variation, here by forward differences within a dark margin. A picture
    without ink has 0. It has no upper end: set a target (``loss: {kind: target, value: ...}``).
    """

    scale = (1.2, 2.2)

    def score(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        ink = F.pad(images.mean(1), (1, 1, 1, 1))
        down, right = ink[:, 1:, :-1] - ink[:, :-1, :-1], ink[:, :-1, 1:] - ink[:, :-1, :-1]
        tiny = torch.finfo(ink.dtype).eps ** 2  # the root has a slope everywhere
        outline = (down.square() + right.square() + tiny).sqrt().sum((1, 2))
        return 2 * ink.sum((1, 2)) / outline
