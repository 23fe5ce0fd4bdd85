"""FVQ: all codes made by one small transformer (VQBridge) from raw ones, so that all of them learn and are used.

arXiv 2509.10140.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.quantizers._codebook import CodebookConfig, CodebookQuantizer
from genkit.rng import hash_seed


class FVQConfig(CodebookConfig):
    """``bridge``: ``vit``, as the paper describes, or ``dit``, as the released scripts launch: with fixed positions and
    a learned modulation that starts closed. ``group_size``: codes a token of the bridge, by default the largest divisor
    of K up to ``K / 1024``, which is kept between 4 and 64; 1 uses more codes where few vectors are there for each, for
    attention among all of them. ``width``: of the bridge, by default ``dim``.
    ``start``: ``zero``, as published: all codes are 0 at first; ``residual``: the raw codes plus the bridge;
    ``spread``: the bridge's last layer is not 0. ``freeze``: the raw codes. ``seed``: of codes and bridge.
    """

    bridge: Literal["vit", "dit"] = "vit"
    group_size: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    depth: int = Field(default=2, ge=1)
    num_heads: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=2.0, gt=0)
    start: Literal["zero", "residual", "spread"] = "zero"
    freeze: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _fit(self):
        width = self.width or self.dim
        if width % self.num_heads:
            raise ValueError(f"a width of {width} is not divisible by num_heads={self.num_heads}")
        if self.bridge == "dit" and width % 4:
            raise ValueError(f"bridge='dit' needs a width divisible by 4 for its positions, not {width}")
        if self.group_size is None and default_group_size(self.codebook_size) == 1:
            raise ValueError(
                f"codebook_size={self.codebook_size} has no divisor from 2 to {_group_limit(self.codebook_size)}; "
                "choose another, or group_size=1"
            )
        if self.group_size is not None and self.codebook_size % self.group_size:
            raise ValueError(f"group_size={self.group_size} does not divide codebook_size={self.codebook_size}")
        return self


def default_group_size(codebook_size: int) -> int:
    """The largest divisor of ``K`` up to ``clamp(K / 1024, 4, 64)``: 4 at 4096, 16 at 16,384, 64 at 65,536."""
    return max(g for g in range(1, _group_limit(codebook_size) + 1) if codebook_size % g == 0)


def _group_limit(codebook_size: int) -> int:
    return min(max(codebook_size // 1024, 4), 64)


class FVQ(CodebookQuantizer):
    """``C^ = f(C)``: groups of g raw codes are the tokens of a pre-norm transformer, whose outputs are the codes.

    ``T_j = W_c vec(C_group j) + b_c``, blocks ``x += Attention(LN x)``, ``x += MLP(LN x)``, and
    ``C^_group j = W_e LN(x_j) + b_e`` with ``W_e = b_e = 0`` at the start and raw codes U(+-1/K). The gradient of one
    code moves all. The search is in ``C^``; :meth:`bake` keeps nothing else. Codes have no order, so groups are of
    neighbours in one row, as there are of any K.

    At the start all codes are one point and all indices 0; usage grows over the first hundred steps or so, with which a
    warm-up of the learning rate helps, as its annealing does at the end.

    Source: Chang et al., "Scalable training for vector-quantized networks with 100% codebook utilization", arXiv
    2509.10140, section 3.
    """

    Config = FVQConfig
    embedding: Tensor

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        config = self.config
        generator = torch.Generator().manual_seed(hash_seed(config.seed, 0x4656))
        k, d, width = self.codebook_size, self.dim, config.width or self.dim
        self.group_size = config.group_size or default_group_size(k)
        start = (torch.rand(k, d, generator=generator) * 2 - 1) / k
        if config.start == "residual":  # which are the codes at first, and must not be one point
            start = torch.randn(k, d, generator=generator) / d**0.5
        if config.freeze:
            self.register_buffer("embedding", start)
        else:
            self.embedding = nn.Parameter(start)
        modulated = config.bridge == "dit"
        with torch.device("meta"):  # initial weights would be drawn from the caller's random stream
            self.compress = nn.Linear(self.group_size * d, width)
            self.blocks = nn.ModuleList(
                _Block(width, config.num_heads, int(width * config.mlp_ratio), modulated) for _ in range(config.depth)
            )
            self.modulation = nn.Linear(width, 2 * width) if modulated else None
            self.recover = nn.Linear(width, self.group_size * d)
        for module in (self.compress, self.blocks, self.modulation, self.recover):
            if module is not None:
                module.to_empty(device="cpu")
        self.label = nn.Parameter(torch.randn(width, generator=generator) * 0.02) if modulated else None
        self._initialise(generator)
        positions = sincos(k // self.group_size, width) if modulated else torch.zeros(0)
        self.register_buffer("positions", positions, persistent=False)

    def _initialise(self, generator: torch.Generator) -> None:
        closed = [*(b.modulation for b in self.blocks if b.modulation is not None), self.modulation]  # type: ignore[union-attr]
        if self.config.start != "spread":
            closed.append(self.recover)
        with torch.no_grad():
            for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
                linear.bias.zero_()
                nn.init.xavier_uniform_(linear.weight, generator=generator)
                if any(linear is one for one in closed):
                    linear.weight.zero_()

    def table(self) -> Tensor:
        x = self.compress(self.embedding.view(-1, self.group_size * self.dim))
        modulation = None
        if self.label is not None:
            x = x + self.get_buffer("positions").to(x)
            modulation = F.silu(self.label)
        x = x[None]
        for block in self.blocks:
            x = block(x, modulation)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        if self.modulation is not None:
            assert modulation is not None
            shift, scale = self.modulation(modulation).chunk(2)
            x = x * (1 + scale) + shift
        codes = self.recover(x).view(self.codebook_size, self.dim)
        return self.embedding + codes if self.config.start == "residual" else codes


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, modulated: bool):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.modulation = nn.Linear(width, 6 * width) if modulated else None

    def forward(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        if self.modulation is None or modulation is None:
            x = x + self._attention(_norm(x))
            return x + self._mlp(_norm(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(modulation).chunk(6)
        x = x + gate1 * self._attention(_norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self._mlp(_norm(x) * (1 + scale2) + shift2)

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def sincos(n: int, width: int) -> Tensor:
    """Fixed positions ``(n, width)`` of tokens in the squarest grid that n allows, a half for each axis."""
    rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) * 4 / width)
    cell = torch.arange(n)
    halves = []
    for place in (cell % (n // rows), cell // (n // rows)):
        angles = place[:, None] * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, 1).float()
