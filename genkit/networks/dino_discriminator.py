"""A discriminator that sees pictures as a frozen vision transformer does."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.networks.discriminator_head import DiscriminatorHead


class DinoDiscriminator(nn.Module):
    """Logits of the tokens of a frozen ViT at several depths, by a small head at each; all 0 before training.

    Args:
        vit: a vision transformer of ``transformers`` that gives hidden states: DINO, DINOv2.
        layers: after which of its layers, from 1 on, its tokens are read; by default four, evenly spaced.
        size: pictures are resized to this side; by default to the next multiple of a patch.
        head: further settings of :class:`genkit.networks.discriminator_head.DiscriminatorHead`.

    Raises:
        ValueError: a layer that there is not; a size that is no multiple of a patch.

    Source: Sauer et al., "StyleGAN-T: unlocking the power of GANs for fast large-scale text-to-image synthesis", arXiv
    2301.09515, section 3.2, whose heads are deeper and told of a prompt.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vit: Any, layers: Sequence[int] | None = None, size: int | None = None, **head: Any):
        super().__init__()
        config = vit.config
        depth, self.patch, self.size = config.num_hidden_layers, config.patch_size, size
        if layers is None:
            layers = sorted({max(1, depth * (i + 1) // 4) for i in range(4)})
        if not layers or not all(1 <= i <= depth for i in layers):
            raise ValueError(f"layers={list(layers)}: accepted are 1 to {depth}, at least one")
        if size is not None and size % self.patch:
            raise ValueError(f"size={size}: accepted are multiples of the patch of {self.patch} pixels")
        self.vit, self.layers = vit.requires_grad_(False), list(layers)
        # DINO, unlike DINOv2, must be asked to take another size than it was trained on.
        accepted = inspect.signature(vit.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        names, widths = [f"layer {i}" for i in self.layers], [config.hidden_size] * len(self.layers)
        self.head = DiscriminatorHead(names, widths, kind="tokens", **head)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.train()

    @classmethod
    def load(cls, model: str | Path, **settings: Any) -> "DinoDiscriminator":
        """On the model of a folder, or of the Hub by its name.

        Raises:
            OSError: neither.
        """
        from transformers import AutoModel

        return cls(AutoModel.from_pretrained(str(model), dtype=torch.float32), **settings)

    def train(self, mode: bool = True) -> "DinoDiscriminator":
        """The heads' mode; the transformer stays in eval mode, without dropout."""
        super().train(mode)
        self.vit.eval()
        return self

    @property
    def smallest(self) -> int:
        """The side of the smallest picture with a logit."""
        return 1

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits ``(B, K)``, in float32 at least, of pictures ``(B, 3 or 1, H, W)`` in [-1, 1]."""
        size = [self.size or -(-side // self.patch) * self.patch for side in pictures.shape[-2:]]
        x = pictures.expand(-1, 3, -1, -1)
        if list(x.shape[-2:]) != size:
            x = F.interpolate(x.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        x = ((x + 1) / 2 - self.mean) / self.std
        states = self.vit(pixel_values=x, output_hidden_states=True, **self._options).hidden_states
        return self.head([states[i] for i in self.layers])
