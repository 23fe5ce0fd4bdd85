"""What a quantizer is: vectors to the nearest of finitely many, a gradient through that, and numbers for each."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class QuantizerConfig(BaseModel):
    """``dim``: channels of what is quantized. An unknown setting is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(ge=1)


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of a batch.

    ``z_q`` is shaped and typed like the input, with the gradient of the estimator, and NaN for a vector that is not
    finite, whose index, in range, means nothing. ``indices``, int64, are ``(B, H, W)`` or ``(B, N)``, with a last axis
    more where a vector has several. ``losses`` are to be added up, their
    weights included. ``stats`` are ``usage``, the share of the codes that this batch hits, and ``perplexity``, ``exp``
    of the entropy of its indices: they say little of a large codebook until they are counted over a whole set
    (:class:`genkit.quantizers.usage.CodeUsage`).
    """

    z_q: Tensor
    indices: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module, ABC):
    """``quantizer(z) -> Quantized`` for ``z`` ``(B, D, H, W)`` or ``(B, N, D)``.

    A subclass in its own file of ``genkit/quantizers/`` is a quantizer named like the file. It names its settings in
    ``Config`` and defines :meth:`quantize` and :meth:`codes`. Everything is computed in float32 at least, without
    autocast: in bfloat16 several percent of the indices are wrong. In eval mode ``z_q`` is the code itself,
    ``codes_from_indices(indices)`` bit for bit (in the type of ``z``). What a codebook learns of a batch without an
    optimiser, such as moving averages, it learns in every call in training mode.

    Attributes:
        codebook_size: K, how many values an index has.
        indices_shape: of one vector's indices: ``()``, or ``(depth,)`` where it has several.
        progress: of training, 0 to 1, for estimators that change with it.
    """

    Config: ClassVar[type[BaseModel]] = QuantizerConfig
    config: Any  # an instance of Config
    codebook_size: int
    indices_shape: tuple[int, ...] = ()

    def __init__(self, **settings: Any):
        super().__init__()
        self.config = self.Config(**settings)
        self.progress = 0.0

    @property
    def dim(self) -> int:
        """D, channels of what is quantized."""
        return self.config.dim

    @property
    def settings(self) -> dict[str, Any]:
        """What :func:`genkit.quantizers.make` makes another like it of."""
        return {"kind": type(self).__module__.rpartition(".")[2], **self.config.model_dump(exclude_unset=True)}

    @abstractmethod
    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Values ``(N, D)``, indices ``(N, *indices_shape)`` and losses of ``z`` ``(N, D)``, float32 or float64.

        In training the values carry the estimator's gradient, in eval mode they are the codes.
        """

    @abstractmethod
    def codes(self, indices: Tensor) -> Tensor:
        """Codes ``(N, D)`` of ``indices`` ``(N, *indices_shape)``, which are in range."""

    def codebook(self) -> Tensor:
        """All codes ``(K, D)``, after every map and normalisation.

        Raises:
            ValueError: vectors have several indices each; more than 2^24 codes, which hardly fit in memory.
        """
        if self.indices_shape:
            raise ValueError(f"{type(self).__name__} has {self.indices_shape} indices a vector, and no single codebook")
        if self.codebook_size > 2**24:
            raise ValueError(
                f"{type(self).__name__} has {self.codebook_size} codes; all at once are accepted up to 2^24"
            )
        return self.codes(torch.arange(self.codebook_size, device=self._device()))

    def bake(self) -> "Quantizer":
        """A quantizer of the same indices and codes without what only training needs; itself where there is no such.

        Its :attr:`settings` and its state make it anew.
        """
        return self

    def forward(self, z: Tensor) -> Quantized:
        """Quantize ``z`` ``(B, D, H, W)`` or ``(B, N, D)``.

        Raises:
            ValueError: another shape or number of channels, no vector at all.
        """
        channels = 1 if z.ndim == 4 else 2
        if z.ndim not in (3, 4) or z.shape[channels] != self.dim or not z.is_floating_point() or not z.numel():
            raise ValueError(
                f"{type(self).__name__}: z of shape {tuple(z.shape)}, {z.dtype}; accepted are floats "
                f"(B, {self.dim}, H, W) and (B, N, {self.dim}), at least one vector"
            )
        last = z.movedim(channels, -1)
        with torch.autocast(z.device.type, enabled=False):
            rows = last.reshape(-1, self.dim).to(torch.promote_types(z.dtype, torch.float32))
            values, indices, losses = self.quantize(rows)
            with torch.no_grad():
                stats = self.stats(indices)
        # Or an encoder that has diverged would look fine: every vector gets some code.
        values = values.masked_fill(~rows.isfinite().all(1, keepdim=True), torch.nan)
        z_q = values.to(z.dtype).view(last.shape).movedim(-1, channels)
        return Quantized(z_q, indices.view(*last.shape[:-1], *self.indices_shape), losses, stats)

    def stats(self, indices: Tensor) -> dict[str, Tensor]:
        """``usage`` and ``perplexity`` of these indices; of several a vector, the means over them."""
        shares, spreads = [], []
        for one in indices.reshape(len(indices), -1).unbind(1):
            counts = one.unique(return_counts=True)[1].double()
            p = counts / max(1, len(one))
            shares.append(p.new_tensor(len(counts) / self.codebook_size))
            spreads.append((-(p * p.log()).sum()).exp())
        return {"usage": torch.stack(shares).mean().float(), "perplexity": torch.stack(spreads).mean().float()}

    def codes_from_indices(self, indices: Tensor) -> Tensor:
        """``z_q`` of ``indices`` as :meth:`forward` gives them: ``(B, D, H, W)`` of ``(B, H, W)``, else ``(B, N, D)``.

        In float32, or in float64 where the codes are, whatever was quantized.

        Raises:
            ValueError: another shape, another type than integers, an index out of range.
        """
        own = len(self.indices_shape)
        shape = tuple(indices.shape[: indices.ndim - own])
        if len(shape) not in (2, 3) or tuple(indices.shape[len(shape) :]) != self.indices_shape:
            wanted = ", ".join(map(str, self.indices_shape))
            raise ValueError(
                f"{type(self).__name__}: indices of shape {tuple(indices.shape)}; accepted are (B, H, W) and (B, N)"
                + (f", each followed by {wanted}" if own else "")
            )
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(f"{type(self).__name__}: indices are {indices.dtype}; accepted are integers")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codebook_size:
            raise ValueError(
                f"{type(self).__name__}: indices are {int(indices.min())} to {int(indices.max())}; accepted are 0 to "
                f"{self.codebook_size - 1}"
            )
        with torch.autocast(indices.device.type, enabled=False):
            found = self.codes(indices.long().reshape(-1, *self.indices_shape)).view(*shape, self.dim)
        return found.movedim(-1, 1) if len(shape) == 3 else found

    def _device(self) -> torch.device:
        return next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
