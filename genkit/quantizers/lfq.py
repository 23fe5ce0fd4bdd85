"""Lookup-free quantization: the signs of the channels, 2^D codes that need no table.

arXiv 2310.05737.
"""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from genkit.quantizers.base import Quantizer, QuantizerConfig
from genkit.quantizers.entropy import average_over_processes, entropy_is_read, entropy_loss
from genkit.quantizers.estimators import SignEstimator, reste_power, signs


class LFQConfig(QuantizerConfig):
    """``beta``: of the commitment loss. ``entropy_weight``, ``entropy_tau``, ``entropy_gamma``: of the entropy loss.
    ``batch_entropy``: of all 2^D codes (``joint``), or that of the bits taken by themselves (``bits``), which is an
    upper bound and cheap. ``spherical``: vectors are normalised and codes +-1/sqrt(D) (BSQ). ``estimator``: of the
    gradient through the sign, see :func:`genkit.quantizers.estimators.signs`; ``reste_end``: its last power.
    """

    dim: int = Field(ge=1, le=62)
    beta: float = Field(default=0.25, ge=0)
    entropy_weight: float = Field(default=0.1, ge=0)
    entropy_tau: float = Field(default=0.01, gt=0)
    entropy_gamma: float = Field(default=1.0, ge=0)
    batch_entropy: Literal["joint", "bits"] = "joint"
    spherical: bool = False
    estimator: SignEstimator = "ste"
    reste_end: float = Field(default=3.0, ge=1)

    @model_validator(mode="after")
    def _fit(self):
        entropy_is_read(self)
        if self.entropy_weight and self.batch_entropy == "joint" and self.dim > 18:
            raise ValueError(f"batch_entropy='joint' is a softmax over 2^{self.dim} codes; above 18 take 'bits'")
        if "reste_end" in self.model_fields_set and self.estimator != "reste":
            raise ValueError("reste_end is of estimator='reste'")
        return self


class LFQ(Quantizer):
    """``code = sign(z)``, +1 at 0; the index is ``sum_i 1[code_i > 0] 2^i``, the first channel the lowest bit.

    Losses ``beta |z - sg q|^2`` and ``entropy_weight (E H(p_n) - gamma H(E p_n))``, ``p`` the softmax of
    ``2 z.c / tau`` over all codes. The first term is exactly the sum over bits of ``H(sigmoid(4 z_i / tau))``.

    Sources: Yu et al., "Language model beats diffusion: tokenizer is key to visual generation", arXiv 2310.05737,
    section 3; ``spherical``: Zhao et al., "Image and video tokenization with binary spherical quantization", arXiv
    2406.07548.
    """

    Config = LFQConfig
    powers: Tensor

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.codebook_size = 2**self.dim
        self.register_buffer("powers", 2 ** torch.arange(self.dim), persistent=False)

    @property
    def scale(self) -> float:
        """What the signs are multiplied by."""
        return self.dim**-0.5 if self.config.spherical else 1.0

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        config = self.config
        if config.spherical:
            z = F.normalize(z, dim=1)
        indices = ((z >= 0) * self.powers).sum(1)
        if not self.training:
            return self.codes(indices).to(z), indices, {}
        q = signs(z, config.estimator, power=reste_power(self.progress, config.reste_end)) * self.scale
        if config.estimator == "ste" and config.spherical:  # the straight-through gradient is that of z, unscaled
            q = z + (q - z).detach()
        losses = {"commitment": config.beta * F.mse_loss(z, q.detach())}
        if config.entropy_weight:
            losses["entropy"] = config.entropy_weight * self._entropy(z)
        return q, indices, losses

    def codes(self, indices: Tensor) -> Tensor:
        return ((indices[:, None] // self.powers % 2) * 2 - 1).float() * self.scale

    def _entropy(self, z: Tensor) -> Tensor:
        config = self.config
        if config.batch_entropy == "joint":
            codes = self.codebook().to(z)
            return entropy_loss(
                z,
                lambda rows: 2 * rows @ codes.T,
                self.codebook_size,
                tau=config.entropy_tau,
                gamma=config.entropy_gamma,
            )
        p = torch.sigmoid(4 * self.scale * z / config.entropy_tau)
        mean = average_over_processes(p.mean(0))
        return (
            _bits(z=4 * self.scale * z / config.entropy_tau).sum(1).mean() - config.entropy_gamma * _binary(mean).sum()
        )


def _bits(z: Tensor) -> Tensor:
    """Entropy of ``sigmoid(z)``, without loss of digits at its ends."""
    return F.softplus(z) - z * torch.sigmoid(z)


def _binary(p: Tensor) -> Tensor:
    return -(p * (p + 1e-12).log() + (1 - p) * (1 - p + 1e-12).log())
