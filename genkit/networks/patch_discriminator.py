"""PatchGAN: a convolutional discriminator that judges overlapping patches of a picture."""

from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit.registry import unknown

Norm = Literal["batch", "group", "none"]
_NORMS = ("batch", "group", "none")


class PatchDiscriminator(ModelMixin, ConfigMixin):
    """A logit for every patch, above 0 where it looks real.

    Convolutions of 4 x 4: ``num_layers`` of stride 2, with ``num_filters`` channels that double up to eight times as
    many, then one of stride 1, and one to the logit; leaky ReLU of slope 0.2 between, and norms but on the first and
    last. A patch has 70 pixels a side for 3 layers, 34 for 2, 16 for 1, 7 for none. Weights start as N(0, 0.02), those
    of norms as N(1, 0.02).

    Args:
        in_channels: of pictures.
        num_filters: of the first layer.
        norm: ``batch``, of statistics of the batch, so that real and generated pictures are to be judged apart;
            ``group``, of groups of up to 32 channels of one picture; or ``none``.

    Raises:
        ValueError: a number out of range, another norm.

    Source: Isola et al., "Image-to-image translation with conditional adversarial networks", arXiv 1611.07004.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, num_filters: int = 64, num_layers: int = 3, norm: Norm = "batch"):
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(unknown("norm", norm, _NORMS))
        if num_filters < 1 or num_layers < 0:
            raise ValueError(f"num_filters={num_filters}, num_layers={num_layers}: at least 1 and 0")
        widths = [num_filters * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = []
        before = in_channels
        for i, width in enumerate(widths):
            normed = i > 0 and norm != "none"
            stride = 2 if i < num_layers else 1
            layers.append(nn.Conv2d(before, width, 4, stride, 1, bias=not (normed and norm == "batch")))
            if normed:
                layers.append(nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(_groups(width), width))
            layers.append(nn.LeakyReLU(0.2))
            before = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.normal_(module.weight, 1.0, 0.02)

    @property
    def smallest(self) -> int:
        """The side of the smallest picture with a logit."""
        return 3 * 2 ** self.config["num_layers"]

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits ``(B, K)``, in float32 at least, of the K patches of pictures ``(B, C, H, W)`` in [-1, 1].

        Raises:
            ValueError: pictures without a patch.
        """
        if min(pictures.shape[-2:]) < self.smallest:
            raise ValueError(
                f"pictures of {pictures.shape[-2]} x {pictures.shape[-1]} pixels: num_layers="
                f"{self.config['num_layers']} takes {self.smallest} at least"
            )
        logits = self.layers(pictures).flatten(1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _groups(width: int) -> int:
    return next(g for g in range(min(32, width), 0, -1) if width % g == 0)
