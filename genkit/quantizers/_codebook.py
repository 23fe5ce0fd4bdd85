"""What quantizers with a table of codes share: search, losses, gradient, baking."""

from abc import abstractmethod
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.quantizers.base import Quantizer, QuantizerConfig
from genkit.quantizers.entropy import entropy_is_read, entropy_loss
from genkit.quantizers.estimators import VectorEstimator, through
from genkit.quantizers.search import Measure, nearest_codes


class CodebookConfig(QuantizerConfig):
    """``codebook_size``: K. ``beta``: of the commitment loss. ``codebook_weight``: of the codebook loss.
    ``estimator``: of the gradient to the encoder. ``measure``: what is nearest; under ``cosine`` vectors and codes are
    normalised first. ``entropy_weight``, ``entropy_tau``, ``entropy_gamma``: of
    :func:`genkit.quantizers.entropy.entropy_loss`, with the affinity ``-|z - c|^2``, or ``z.c`` where that decides.
    ``chunk_size``: codes searched at a time.
    """

    codebook_size: int = Field(ge=1)
    beta: float = Field(default=0.25, ge=0)
    codebook_weight: float = Field(default=1.0, ge=0)
    estimator: VectorEstimator = "ste"
    measure: Measure = "euclidean"
    entropy_weight: float = Field(default=0.0, ge=0)
    entropy_tau: float = Field(default=0.01, gt=0)
    entropy_gamma: float = Field(default=1.0, ge=0)
    chunk_size: int = Field(default=2048, ge=1)

    @model_validator(mode="after")
    def _entropy_is_read(self):
        return entropy_is_read(self)


class CodebookQuantizer(Quantizer):
    """The nearest row of :meth:`table`, with the losses ``w |q - sg z|^2 + beta |z - sg q|^2``, means over elements."""

    Config = CodebookConfig

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.codebook_size = self.config.codebook_size

    @abstractmethod
    def table(self) -> Tensor:
        """The codes ``(K, D)``, with the gradient to what they are made of."""

    def codebook(self) -> Tensor:
        return self._normalised(self._table())

    def _table(self) -> Tensor:
        with torch.autocast(self._device().type, enabled=False):
            table = self.table()
        return table.to(torch.promote_types(table.dtype, torch.float32))

    def codes(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook())

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z, table = self._normalised(z), self.codebook().to(z.dtype)
        indices = self.search(z, table)
        q = F.embedding(indices, table)
        if not self.training:
            return q, indices, {}
        return through(z, q, self.config.estimator), indices, self.losses(z, q, table)

    def search(self, z: Tensor, table: Tensor) -> Tensor:
        """Indices ``(N,)`` of the nearest rows of ``table``."""
        # Both are normalised under "cosine", which the inner product then is.
        measure: Measure = "euclidean" if self.config.measure == "euclidean" else "dot"
        return nearest_codes(z, table, measure=measure, chunk_size=self.config.chunk_size)

    def losses(self, z: Tensor, q: Tensor, table: Tensor) -> dict[str, Tensor]:
        """By name and with their weights."""
        config = self.config
        found = {"commitment": config.beta * F.mse_loss(z, q.detach())}
        if config.codebook_weight and q.requires_grad:
            found["codebook"] = config.codebook_weight * F.mse_loss(q, z.detach())
        if config.entropy_weight:
            table = table.clone()  # a codebook may move before the gradient computes affinities again
            found["entropy"] = config.entropy_weight * entropy_loss(
                z,
                lambda rows: self.affinity(rows, table),
                self.codebook_size,
                tau=config.entropy_tau,
                gamma=config.entropy_gamma,
            )
        return found

    def affinity(self, z: Tensor, table: Tensor) -> Tensor:
        """``(N, K)``: what the entropy's softmax is of."""
        product = z @ table.T
        if self.config.measure != "euclidean":
            return product
        return 2 * product - table.square().sum(1) - z.square().sum(1, keepdim=True)

    def bake(self) -> Quantizer:
        """Plain :class:`genkit.quantizers.vq.VQ` on the codes as they are now, in eval mode."""
        from genkit.quantizers.vq import VQ

        kept = ("dim", "codebook_size", "measure", "chunk_size")
        baked = VQ(**{name: getattr(self.config, name) for name in kept})
        with torch.no_grad():
            # Before they are normalised: what is normalised twice is not the same to the last bit.
            baked.embedding = nn.Parameter(self._table().clone())
        return baked.eval()

    def _normalised(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.measure == "cosine" else x
