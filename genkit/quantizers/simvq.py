"""SimVQ: frozen random codes seen through one linear map, which moves them all.

arXiv 2411.02038.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.quantizers._codebook import CodebookConfig, CodebookQuantizer
from genkit.rng import hash_seed


class SimVQConfig(CodebookConfig):
    """``freeze``: the codes, as published; only the map learns. ``bias``: of the map. ``seed``: of codes and map."""

    freeze: bool = True
    bias: bool = True
    seed: int = 0


class SimVQ(CodebookQuantizer):
    """``C^ = C W^T + b`` with ``C ~ N(0, 1/D)``: the gradient of one code moves all.

    Its published losses are ``|q - sg z|^2 + beta |z - sg q|^2`` as here.

    Source: Zhu et al., "Addressing representation collapse in vector quantized models with one linear layer", arXiv
    2411.02038.
    """

    Config = SimVQConfig
    embedding: Tensor

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        generator = torch.Generator().manual_seed(hash_seed(self.config.seed, 0x5351))
        start = torch.randn(self.codebook_size, self.dim, generator=generator) / self.dim**0.5
        if self.config.freeze:
            self.register_buffer("embedding", start)
        else:
            self.embedding = nn.Parameter(start)
        bound = self.dim**-0.5  # as torch.nn.Linear starts
        self.weight = nn.Parameter((torch.rand(self.dim, self.dim, generator=generator) * 2 - 1) * bound)
        self.bias = (
            nn.Parameter((torch.rand(self.dim, generator=generator) * 2 - 1) * bound) if self.config.bias else None
        )

    def table(self) -> Tensor:
        return F.linear(self.embedding, self.weight, self.bias)
