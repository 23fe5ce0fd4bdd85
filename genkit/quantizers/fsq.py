"""Finite scalar quantization: every channel to one of a few levels, without a codebook to learn.

arXiv 2309.15505.
"""

import math
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from genkit.quantizers.base import Quantizer, QuantizerConfig
from genkit.quantizers.estimators import RoundEstimator, rounded


class FSQConfig(QuantizerConfig):
    """``levels``: of each channel, as many as ``dim``: ``[8, 6, 5]`` for about 2^8 codes, ``[8, 5, 5, 5]`` 2^10,
    ``[7, 5, 5, 5, 5]`` 2^12, ``[8, 8, 8, 5, 5, 5]`` 2^16. ``estimator``, ``sharpness``: of the gradient through
    rounding, see :func:`genkit.quantizers.estimators.rounded`.
    """

    levels: tuple[int, ...] = Field(min_length=1)
    estimator: RoundEstimator = "ste"
    sharpness: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _levels_fit(self):
        if len(self.levels) != self.dim:
            raise ValueError(f"levels={list(self.levels)} are of {len(self.levels)} channels, dim={self.dim}")
        if not 3 <= min(self.levels) <= max(self.levels) <= 1000:
            raise ValueError(f"levels={list(self.levels)}: expected 3 to 1000 each (for 2 take quantizer 'lfq')")
        if "sharpness" in self.model_fields_set and self.estimator != "dgm":
            raise ValueError("sharpness is of estimator='dgm'")
        return self


class FSQ(Quantizer):
    """``code = round(b(z)) / floor(L / 2)`` with ``b(z) = tanh(z + s) h - o``, no losses.

    ``h = (L - 1)(1 + 1e-3) / 2``, ``o`` 1/2 for even L and else 0, ``s = atanh(o / h)``, so that ``b(0) = 0``. An even
    L has one more level below 0 than above. The index is ``sum_i (round(b_i) + floor(L_i / 2)) prod_(j<i) L_j``.

    Source: Mentzer et al., "Finite scalar quantization: VQ-VAE made simple", arXiv 2309.15505, section 3.1.
    """

    Config = FSQConfig
    levels: Tensor
    strides: Tensor

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        levels = torch.tensor(self.config.levels)
        self.codebook_size = math.prod(self.config.levels)
        self.register_buffer("levels", levels, persistent=False)
        strides = torch.cat((torch.ones(1, dtype=torch.int64), levels.cumprod(0)[:-1]))
        self.register_buffer("strides", strides, persistent=False)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        half = (self.levels - 1).to(z) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(z)
        bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
        level = rounded(bounded, self.config.estimator, sharpness=self.config.sharpness)
        indices = ((bounded.detach().nan_to_num().round().long() + self.levels // 2) * self.strides).sum(1)
        return (level / (self.levels // 2) if self.training else self.codes(indices).to(z)), indices, {}

    def codes(self, indices: Tensor) -> Tensor:
        steps = indices[:, None] // self.strides % self.levels - self.levels // 2
        return steps.float() / (self.levels // 2)
