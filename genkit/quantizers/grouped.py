"""Grouped (product) quantization: the channels in groups, each with indices of its own."""

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from genkit.quantizers._parts import make_parts
from genkit.quantizers.base import Quantizer, QuantizerConfig


class GroupedConfig(QuantizerConfig):
    """``quantizer``: what codes a group, ``kind`` with its settings beside ``dim``. ``groups``: how many, of ``dim /
    groups`` channels each.
    """

    quantizer: dict[str, Any]
    groups: int = Field(ge=1)

    @model_validator(mode="after")
    def _divides(self):
        if self.dim % self.groups:
            raise ValueError(f"groups={self.groups} does not divide dim={self.dim}")
        if "dim" in self.quantizer:
            raise ValueError("quantizer.dim is dim / groups: leave it out")
        return self


class Grouped(Quantizer):
    """``q = [q_1(z_1), ..., q_G(z_G)]``; ``groups`` indices a vector, losses the means over groups.

    Source: Jegou et al., "Product quantization for nearest neighbor search", 2011.
    """

    Config = GroupedConfig

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        config = self.config
        self.parts = make_parts(self, config.quantizer, dim=config.dim // config.groups, count=config.groups)
        first: Quantizer = self.parts[0]  # type: ignore[assignment]
        self.codebook_size = first.codebook_size
        self.indices_shape = (config.groups, *first.indices_shape)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        values, indices = [], []
        losses: dict[str, Tensor] = {}
        for part, some in zip(self.parts, z.chunk(self.config.groups, dim=1), strict=True):
            assert isinstance(part, Quantizer)
            part.progress = self.progress
            q, chosen, found = part.quantize(some)
            values.append(q)
            indices.append(chosen)
            for name, loss in found.items():
                losses[name] = losses.get(name, 0.0) + loss / self.config.groups
        return torch.cat(values, 1), torch.stack(indices, 1), losses

    def codes(self, indices: Tensor) -> Tensor:
        return torch.cat([part.codes(one) for part, one in zip(self.parts, indices.unbind(1), strict=True)], 1)  # type: ignore[operator]

    def bake(self) -> "Quantizer":
        parts = [part.bake() for part in self.parts]  # type: ignore[operator]
        inner = {name: value for name, value in parts[0].settings.items() if name != "dim"}
        baked = type(self)(**{**self.config.model_dump(exclude_unset=True), "quantizer": inner})
        baked.parts = nn.ModuleList(parts)
        return baked.eval()
