"""DISTS, structure and texture similarity of images as a distance, and its edge-aware form."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.perceptual._weights import backbone_weights, check_pictures, shipped
from genkit.registry import unknown

logger = logging.getLogger("genkit.perceptual")

Padding = Literal["zeros", "reflect"]
# Convolutions of VGG16 by their place in torchvision's ``features``; a stage ends where DISTS reads it.
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_LEARNED = 1475  # channels of the picture and of VGG16's five stages, which the learned weights belong to
_SHIPPED = ("torchmetrics", "functional/image/dists_models/weights.pt")
_C = 1e-6


class DISTS(nn.Module):
    """Structure and texture similarity: ``sum_c a_c (1 - l_c) + b_c (1 - s_c)``, a distance ``>= 0`` of every pair.

    With means and variances over the pixels of a channel ``c``, of the pictures ``x``, ``y`` themselves and of five
    stages of VGG16 whose max-pooling is replaced by the blurred ``sqrt(blur(f^2) + 1e-12)``::

        1 - l = (mx - my)^2 / (mx^2 + my^2 + 1e-6)          1 - s = Var(x - y) / (Var x + Var y + 1e-6)

    which is the published form without its cancellation: equal pictures have distance 0 exactly. ``a`` and ``b`` are
    divided by the sum of all of them. Computed in float32 at least, without autocast; weights are frozen.

    Args:
        vgg: weights of VGG16's convolutions by torchvision's names, with or without ``features.`` before them; of any
            width.
        alpha, beta: ``a`` and ``b`` ``(C,)``, ``C`` being 3 and the channels of the stages; equal ones by default.

    Raises:
        ValueError: a convolution is missing, or weights of another number.

    Source: Ding et al., "Image quality assessment: unifying structure and texture similarity", arXiv 2004.07728.
    """

    alpha: Tensor
    beta: Tensor
    blur: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, vgg: Mapping[str, Tensor], alpha: Tensor | None = None, beta: Tensor | None = None):
        super().__init__()
        named = {name.removeprefix("features."): tensor for name, tensor in vgg.items()}
        missing = [f"{i}.weight" for stage in _STAGES for i in stage if f"{i}.weight" not in named]
        if missing:
            raise ValueError(f"vgg lacks {missing}: accepted are the weights of torchvision's vgg16")
        self.stages = nn.ModuleList(nn.ModuleList(_convolution(named, i) for i in stage) for stage in _STAGES)
        channels = 3 + sum(len(named[f"{stage[-1]}.bias"]) for stage in _STAGES)
        for name, given in (("alpha", alpha), ("beta", beta)):
            weights = torch.ones(channels) if given is None else given.detach().float().flatten()
            if len(weights) != channels:
                raise ValueError(f"{name} has {len(weights)} weights; VGG and picture have {channels} channels")
            self.register_buffer(name, weights)
        ramp = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("blur", ramp[:, None] * ramp, persistent=False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, vgg: str | Path) -> "DISTS":
        """DISTS on the VGG16 of a file, or of torchvision.

        ``a`` and ``b`` are the published, learned ones where torchmetrics, which ships them, is installed; otherwise
        they are equal, and a warning says so.

        Args:
            vgg: a file, ``.safetensors`` or torchvision's ``.pth``; or ``torchvision``, which downloads its weights for
                ImageNet unless they are in its cache.

        Raises:
            FileNotFoundError: no such file.
            ImportError: torchvision is asked for and not installed.
            ValueError: a file of something else.
        """
        state = backbone_weights("vgg", vgg, "VGG16_Weights")
        made = cls(state)
        learned = shipped(_SHIPPED) if len(made.alpha) == _LEARNED else None
        if learned is not None:
            made.alpha.copy_(learned["alpha"].flatten())
            made.beta.copy_(learned["beta"].flatten())
        elif len(made.alpha) == _LEARNED:
            logger.warning("DISTS: weights are equal; install torchmetrics for the published ones")
        else:
            logger.warning("DISTS: weights are equal, since vgg=%r is not as wide as VGG16", str(vgg))
        return made

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances ``(B,)`` of pictures ``(B, C, H, W)`` in [0, 1], ``C`` 3, or 1 for grey.

        Raises:
            ValueError: shapes that differ or are not those of pictures.
        """
        check_pictures(x, y)
        with torch.autocast(x.device.type, enabled=False):
            total = self.alpha.sum() + self.beta.sum()
            pairs = zip(self._features(x), self._features(y), strict=True)
            light, texture = zip(*(_dissimilarities(f, g) for f, g in pairs), strict=True)
            return torch.cat(light, 1) @ (self.alpha / total) + torch.cat(texture, 1) @ (self.beta / total)

    def _features(self, x: Tensor) -> list[Tensor]:
        x = x.to(self.mean).expand(-1, 3, -1, -1)
        found, h = [x], (x - self.mean) / self.std
        for k, stage in enumerate(self.stages):
            if k:
                kernel = self.blur.expand(h.shape[1], 1, 3, 3)
                h = (F.conv2d(h.square(), kernel, stride=2, padding=1, groups=h.shape[1]) + 1e-12).sqrt()
            for convolution in cast(nn.ModuleList, stage):
                h = F.relu(convolution(h))
            found.append(h)
        return found


class EADISTS(nn.Module):
    """``DISTS(x, y) + DISTS(S(x), S(y))``: in flat regions and along edges; ``S`` is :func:`sobel`.

    Args:
        dists: the distance of pictures.
        padding: of the edge maps, ``zeros`` as published or ``reflect``.

    Source: Li et al., "Distillation-free one-step diffusion for real-world image super-resolution", arXiv 2410.04224.
    """

    def __init__(self, dists: DISTS, padding: Padding = "zeros"):
        super().__init__()
        if padding not in get_args(Padding):
            raise ValueError(unknown("padding", padding, get_args(Padding)))
        self.dists, self.padding = dists, padding

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances ``(B,)`` of pictures ``(B, 3 or 1, H, W)`` in [0, 1]."""
        return self.dists(x, y) + self.dists(sobel(x, self.padding), sobel(y, self.padding))


def sobel(pictures: Tensor, padding: Padding = "zeros") -> Tensor:
    """``sqrt(gx^2 + gy^2 + 1e-6)`` of the mean over channels by Sobel's kernels, not rescaled: ``(B, 3, H, W)``.

    The constant keeps the gradient finite in flat regions. ``zeros`` around the picture frame it with edges that it
    does not have (4 along the sides of a picture of ones), which ``reflect`` does not. In float32 at least.
    """
    grey = pictures.to(torch.promote_types(pictures.dtype, torch.float32)).mean(1, keepdim=True)
    across = grey.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    grey = F.pad(grey, (1, 1, 1, 1), mode="constant" if padding == "zeros" else "reflect")
    with torch.autocast(pictures.device.type, enabled=False):
        slopes = F.conv2d(grey, torch.stack((across, across.T))[:, None])
    return (slopes.square().sum(1, keepdim=True) + 1e-6).sqrt().expand(-1, 3, -1, -1)


def _dissimilarities(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``1 - l`` and ``1 - s`` of every channel: ``(B, C)`` each."""
    f, g = f.flatten(2), g.flatten(2)
    light = (f.mean(2) - g.mean(2)).square() / (f.mean(2).square() + g.mean(2).square() + _C)
    spreads = [h.var(2, unbiased=False) for h in (f - g, f, g)]
    return light, spreads[0] / (spreads[1] + spreads[2] + _C)


def _convolution(named: Mapping[str, Tensor], i: int) -> nn.Conv2d:
    weight, bias = named[f"{i}.weight"], named[f"{i}.bias"]
    layer = nn.utils.skip_init(nn.Conv2d, weight.shape[1], weight.shape[0], 3, padding=1)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return cast(nn.Conv2d, layer)
