"""Residual quantization: each quantizer codes what the ones before it left.

arXiv 2203.01941.
"""

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from genkit.quantizers._parts import make_parts
from genkit.quantizers.base import Quantizer, QuantizerConfig
from genkit.quantizers.estimators import VectorEstimator, through


class ResidualConfig(QuantizerConfig):
    """``quantizer``: what codes a residual, ``kind`` with its settings beside ``dim``. ``depth``: how many.
    ``shared``: one codebook for all. ``estimator``: of the gradient through the sum of codes, in place of the
    quantizers' own.
    """

    quantizer: dict[str, Any]
    depth: int = Field(ge=1)
    shared: bool = False
    estimator: VectorEstimator = "ste"

    @model_validator(mode="after")
    def _quantizer_fits(self):
        if "estimator" in self.quantizer:
            raise ValueError("quantizer.estimator has no effect on a residual one: set its own estimator instead")
        if self.quantizer.get("kind") == "ibq":
            raise ValueError("quantizer.kind='ibq' learns by the gradient of its own output, which the sum replaces")
        if "dim" in self.quantizer:
            raise ValueError("quantizer.dim is that of the residual one: leave it out")
        return self


class Residual(Quantizer):
    """``q = sum_d q_d`` with ``q_d`` the code of ``z - sum_(e<d) q_e``; ``depth`` indices a vector.

    Losses are means over depths; the gradient to the encoder is that of one estimator for the whole sum.

    Source: Lee et al., "Autoregressive image generation using residual quantization", arXiv 2203.01941, section 3.1.
    """

    Config = ResidualConfig

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        config = self.config
        count = 1 if config.shared else config.depth
        self.parts = make_parts(self, config.quantizer, dim=config.dim, count=count)
        first = self.part(0)
        if first.indices_shape:
            raise ValueError(f"quantizer={first.settings['kind']!r} has several indices a vector already")
        self.codebook_size, self.indices_shape = first.codebook_size, (config.depth,)

    def part(self, depth: int) -> Quantizer:
        """What codes the residual of this depth."""
        return self.parts[0 if self.config.shared else depth]  # type: ignore[return-value]

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rest, total, indices = z, torch.zeros_like(z), []
        losses: dict[str, Tensor] = {}
        for depth in range(self.config.depth):
            part = self.part(depth)
            part.progress = self.progress
            q, chosen, found = part.quantize(rest)
            codes = q.detach() if self.training else q
            rest, total = rest - codes, total + codes
            indices.append(chosen)
            for name, loss in found.items():
                losses[name] = losses.get(name, 0.0) + loss / self.config.depth
        stacked = torch.stack(indices, 1)
        if not self.training:
            return self.codes(stacked).to(z), stacked, {}
        return through(z, total, self.config.estimator), stacked, losses

    def codes(self, indices: Tensor) -> Tensor:
        parts = [self.part(depth).codes(one) for depth, one in enumerate(indices.unbind(1))]
        return torch.stack(parts).sum(0)

    def bake(self) -> "Quantizer":
        parts = [part.bake() for part in self.parts]  # type: ignore[operator]
        inner = {name: value for name, value in parts[0].settings.items() if name != "dim"}
        baked = type(self)(**{**self.config.model_dump(exclude_unset=True), "quantizer": inner})
        baked.parts = nn.ModuleList(parts)
        return baked.eval()
