"""LPIPS: how far apart two images are in the features of a classifier, weighted as people judge."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.perceptual._weights import backbone_weights, check_pictures, shipped
from genkit.registry import unknown

logger = logging.getLogger("genkit.perceptual")

Net = Literal["alex", "vgg", "squeeze"]
_POOL = "pool"
# Layers by their place in torchvision's ``features``; a stage ends where LPIPS reads it.
_STAGES: dict[str, tuple[tuple[int | str, ...], ...]] = {
    "alex": ((0,), (_POOL, 3), (_POOL, 6), (8,), (10,)),
    "vgg": ((0, 2), (_POOL, 5, 7), (_POOL, 10, 12, 14), (_POOL, 17, 19, 21), (_POOL, 24, 26, 28)),
    "squeeze": ((0,), (_POOL, 3, 4), (_POOL, 6, 7), (_POOL, 9), (10,), (11,), (12,)),
}
_POOLS = {"alex": (3, False), "vgg": (2, False), "squeeze": (3, True)}  # size, and whether a rest counts
_FIRST = {"alex": dict(stride=4, padding=2), "squeeze": dict(stride=2, padding=0)}  # others keep the size
_LEAST = {"alex": 31, "vgg": 16, "squeeze": 17}
_TORCHVISION = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
_EPS = 1e-10


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, version 0.1: a distance ``>= 0`` of every pair.

    With ``f_l`` and ``g_l`` the features ``(C_l, H_l, W_l)`` of both pictures after stage ``l`` of a classifier, each
    divided by its length over the channels, ``f / (|f| + 1e-10)``, and weights ``w_l >= 0`` of the channels::

        sum_l mean_{h, w} sum_c w_lc (f_lchw - g_lchw)^2

    Five stages of ``alex`` (AlexNet) and ``vgg`` (VGG16), seven of ``squeeze`` (SqueezeNet 1.1). The 1e-10 is outside
    the root, as in the authors' package; torchmetrics has ``f / sqrt(|f|^2 + 1e-8)``, which is less where features are
    small. Computed in float32 at least, without autocast; weights are frozen.

    Args:
        net: which classifier.
        backbone: its weights by torchvision's names, with or without ``features.`` before them; of any width.
        weights: ``w_l`` ``(C_l,)`` of every stage; 1 by default, the unlearned distance of the paper.

    Raises:
        ValueError: an unknown ``net``; a layer is missing; weights of another number.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924,
    eq. 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Net, backbone: Mapping[str, Tensor], weights: Sequence[Tensor] | None = None):
        super().__init__()
        if net not in get_args(Net):
            raise ValueError(unknown("net", net, get_args(Net)))
        self.net = net
        named = {name.removeprefix("features."): tensor for name, tensor in backbone.items()}
        size, whole = _POOLS[net]
        pool = nn.MaxPool2d(size, 2, ceil_mode=whole)
        self.stages = nn.ModuleList(
            nn.Sequential(*(pool if at == _POOL else _layer(net, named, cast(int, at)) for at in stage))
            for stage in _STAGES[net]
        )
        channels = [int(cast(Any, stage)[-1].channels) for stage in self.stages]
        given = [torch.ones(n) for n in channels] if weights is None else [w.detach().flatten() for w in weights]
        if (lengths := [len(w) for w in given]) != channels:
            raise ValueError(f"weights of {lengths} channels; the stages of net={net!r} have {channels}")
        self.weights = nn.ParameterList(w.to(torch.float32) for w in given)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, net: Net, backbone: str | Path) -> "LPIPS":
        """LPIPS on the classifier of a file, or of torchvision.

        ``w`` are the published, learned ones of version 0.1 where torchmetrics or lpips, which ship them, is installed;
        otherwise they are 1, and a warning says so.

        Args:
            backbone: a file, ``.safetensors`` or torchvision's ``.pth``; or ``torchvision``, which downloads its
                weights for ImageNet unless they are in its cache.

        Raises:
            FileNotFoundError: no such file.
            ImportError: torchvision is asked for and not installed.
            ValueError: an unknown ``net``, a file of something else.
        """
        if net not in get_args(Net):
            raise ValueError(unknown("net", net, get_args(Net)))
        made = cls(net, backbone_weights("backbone", backbone, _TORCHVISION[net]))
        learned = shipped(
            ("torchmetrics", f"functional/image/lpips_models/{net}.pth"), ("lpips", f"weights/v0.1/{net}.pth")
        )
        if learned is None:
            logger.warning("LPIPS: weights are 1, not learned; install torchmetrics for the published ones")
            return made
        published = [learned[f"lin{i}.model.1.weight"].flatten() for i in range(len(made.weights))]
        if [len(w) for w in published] != [len(w) for w in made.weights]:
            logger.warning("LPIPS: weights are 1, not learned, since backbone=%r is not as wide", str(backbone))
            return made
        for own, theirs in zip(made.weights, published, strict=True):
            own.data.copy_(theirs)
        return made

    @property
    def learned(self) -> bool:
        """Whether channels are weighted by other numbers than 1."""
        return any(bool((w != 1).any()) for w in self.weights)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances ``(B,)`` of pictures ``(B, C, H, W)`` in [0, 1], ``C`` 3, or 1 for grey.

        The authors' package takes [-1, 1]: give it ``2 x - 1``, or here ``(x + 1) / 2`` of its pictures.

        Raises:
            ValueError: shapes that differ, are not those of pictures, or are too small for the network.
        """
        check_pictures(x, y)
        if min(x.shape[2:]) < _LEAST[self.net]:
            raise ValueError(
                f"pictures of {x.shape[2]} x {x.shape[3]} pixels: net={self.net!r} takes {_LEAST[self.net]} at least"
            )
        f, g = ((2 * h.to(self.shift).expand(-1, 3, -1, -1) - 1 - self.shift) / self.scale for h in (x, y))
        total = f.new_zeros(len(f))
        with torch.autocast(x.device.type, enabled=False):
            for stage, weights in zip(self.stages, self.weights, strict=True):
                f, g = stage(f), stage(g)
                apart = (_unit(f) - _unit(g)).square().mean((2, 3))
                total = total + apart @ weights
        return total


def _unit(f: Tensor) -> Tensor:
    # vector_norm, unlike the root of a sum, has a finite gradient where all features are 0.
    return f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + _EPS)


class _Convolution(nn.Module):
    """A convolution and its rectifier."""

    def __init__(self, named: Mapping[str, Tensor], name: str, **geometry: int):
        super().__init__()
        weight = named[f"{name}.weight"]
        geometry = geometry or dict(padding=weight.shape[2] // 2)
        self.layer = nn.utils.skip_init(nn.Conv2d, weight.shape[1], weight.shape[0], weight.shape[2], **geometry)
        self.layer.load_state_dict({"weight": weight, "bias": named[f"{name}.bias"]})
        self.channels = len(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class _Fire(nn.Module):
    """SqueezeNet's module: few channels, then two sets of many."""

    def __init__(self, named: Mapping[str, Tensor], name: str):
        super().__init__()
        self.squeeze = _Convolution(named, f"{name}.squeeze")
        self.expand = nn.ModuleList(_Convolution(named, f"{name}.expand{k}x{k}") for k in (1, 3))
        self.channels = sum(cast(_Convolution, part).channels for part in self.expand)

    def forward(self, x: Tensor) -> Tensor:
        h = self.squeeze(x)
        return torch.cat([part(h) for part in self.expand], 1)


def _layer(net: str, named: Mapping[str, Tensor], at: int) -> nn.Module:
    try:
        if net == "squeeze" and at:
            return _Fire(named, str(at))
        return _Convolution(named, str(at), **(_FIRST.get(net, {}) if at == 0 else {}))
    except KeyError as error:
        raise ValueError(f"backbone lacks {error}: accepted are the weights of torchvision's net={net!r}") from error
