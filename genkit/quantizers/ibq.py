"""Index back-propagation quantization: a gradient for every code, through the softmax of all.

arXiv 2412.02692.
"""

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.quantizers._codebook import CodebookConfig, CodebookQuantizer
from genkit.quantizers.entropy import by_rows
from genkit.quantizers.search import Measure
from genkit.rng import hash_seed

_NUMBERS = 2**24  # of logits held at a time


class IBQConfig(CodebookConfig):
    """As published by default: the largest inner product decides, an entropy loss of weight 0.05, and the smaller
    weight, 0.25, on the codebook loss, not on the commitment loss.

    ``straight_weight``: of ``|q - z|^2`` without a stopped gradient. ``seed``: of the codes, N(0, 1).
    """

    measure: Measure = "dot"
    beta: float = Field(default=1.0, ge=0)
    codebook_weight: float = Field(default=0.25, ge=0)
    entropy_weight: float = Field(default=0.05, ge=0)
    straight_weight: float = Field(default=1.0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _no_estimator(self):
        if "estimator" in self.model_fields_set:
            raise ValueError("estimator has no effect: the gradient of ibq is that of its softmax")
        return self


class IBQ(CodebookQuantizer):
    """``q = s C`` with ``s = onehot(argmax l) - sg p + p``, ``p = softmax(l)``, ``l = z C^T``.

    In value ``q`` is the code; its gradient reaches all codes, and ``z``, through ``p``. Losses
    ``|q - z|^2 + beta |z - sg c|^2 + w |c - sg z|^2`` and the entropy's. Logits are computed again for the gradient,
    some rows at a time, instead of being kept.

    Source: Shi et al., "Scalable image tokenization with index backpropagation quantization", arXiv 2412.02692, section
    3.2.
    """

    Config = IBQConfig

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        generator = torch.Generator().manual_seed(hash_seed(self.config.seed, 0x4942))
        self.embedding = nn.Parameter(torch.randn(self.codebook_size, self.dim, generator=generator))

    def table(self) -> Tensor:
        return self.embedding

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z, table = self._normalised(z), self.codebook().to(z.dtype)
        indices = self.search(z, table)
        if not self.training:
            return F.embedding(indices, table), indices, {}

        def soft(rows: Tensor, chosen: Tensor, codes: Tensor) -> tuple[Tensor]:
            mean = self.affinity(rows, codes).softmax(1) @ codes.detach()  # the other factor of s C is the one-hot
            return (F.embedding(chosen, codes) + mean - mean.detach(),)

        step = max(1, _NUMBERS // len(table))
        parts = [
            by_rows(soft, rows, some, table)[0] for rows, some in zip(z.split(step), indices.split(step), strict=True)
        ]
        q = torch.cat(parts)
        losses = self.losses(z, F.embedding(indices, table), table)
        if self.config.straight_weight:
            losses["straight"] = self.config.straight_weight * F.mse_loss(q, z)
        return q, indices, losses
