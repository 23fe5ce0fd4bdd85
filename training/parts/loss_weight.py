"""A learned weight of a loss at two times."""

import math

import torch
from torch import Tensor, nn


class LossWeight(nn.Module):
    """``w(t, s)``: logarithm of the expected squared residual, learned; 0 at the start, kept within [-10, 10].

    128 cosine features of each time, averaged, through one bias-free linear layer. It is thus a function of ``t`` plus
    the same function of ``s``, too plain to single out the diagonal ``s = t``. That is wanted: the diagonal residual
    stays at the variance of the data while the other one falls towards 0, and a weight that told the two apart would
    favour the second without bound.
    """

    frequencies: Tensor

    def __init__(self, features: int = 128):
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(1e-4), features // 2, dtype=torch.float64)).float()
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        def embed(time: Tensor) -> Tensor:
            angle = time[:, None] * self.frequencies.to(time.dtype)
            return torch.cat((angle.cos(), angle.sin()), dim=-1)

        features = (embed(t) + embed(s)) / 2
        return self.linear(features.to(self.linear.weight.dtype))[:, 0].float().clamp(-10, 10)
