"""A small diffusion transformer with two times: a flow model on its diagonal, a flow map off it."""

import math
from collections.abc import Mapping

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from genkit._diffusers import set_config


class TimeFeatures(nn.Module):
    """``[1 - cos(f t), sin(f t)]`` at ``dim / 2`` log-spaced angular frequencies; zero at ``t = 0``.

    ``t`` is in [0, 1] and is not multiplied by 1000: high frequencies would make ``du/ds`` explode.
    """

    frequencies: Tensor

    def __init__(self, dim: int, max_frequency: float):
        super().__init__()
        frequencies = torch.logspace(0, math.log10(max_frequency), dim // 2, dtype=torch.float64)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies.to(t.dtype)
        return torch.cat((1 - angle.cos(), angle.sin()), dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block whose norms are shifted, scaled and gated by the embedding ``c`` (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        b, n, d = h.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = torch.addcmul(shift1, self.norm1(h), 1 + scale1)
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        h = torch.addcmul(h, gate1, self.proj(x))
        x = torch.addcmul(shift2, self.norm2(h), 1 + scale2)
        return torch.addcmul(h, gate2, self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class DiT(ModelMixin, ConfigMixin):
    """``u(x, t, s, class_labels)``: average velocity from ``t`` to ``s <= t``; at ``s = t`` the velocity.

    Conditioned through ``c = E_t(t) + E_gap(t - s) + E_class``, and further scalars in the same way. ``E_gap`` vanishes
    at a gap of 0 and starts at zero, so a network trained as a flow model becomes a flow map that equals it for every
    ``s``. Input and output are scaled by ``sigma_data``; the last layer starts at zero.

    Args:
        sample_size: side of the square image or latent.
        in_channels, patch_size, hidden_size, num_layers, num_heads, mlp_ratio: as in DiT.
        num_classes: class labels ``0 .. num_classes - 1``; label ``num_classes`` means "no class". 0: unconditional.
        sigma_data: standard deviation of the data.
        max_frequency: highest angular frequency of the time features, radians per unit of ``t``.
        scalars: further numbers of order 1 that are embedded, by name, with their defaults; see
            :meth:`genkit.denoisers.base.FlowMap.add_scalars`.

    Source: Peebles and Xie, "Scalable diffusion models with transformers", arXiv 2212.09748 (adaLN-Zero); Boffi et
    al., arXiv 2505.18825 (start time and gap as the two times, unscaled times).
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        patch_size: int = 2,
        hidden_size: int = 96,
        num_layers: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 10,
        sigma_data: float = 0.5,
        max_frequency: float = 16.0,
        scalars: dict[str, float] | None = None,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size={sample_size} is not a multiple of patch_size={patch_size}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}")
        grid = sample_size // patch_size
        self.embed = nn.Linear(in_channels * patch_size**2, hidden_size)
        self.position = nn.Parameter(torch.randn(1, grid**2, hidden_size) * 0.1)
        self.time_features = TimeFeatures(64, max_frequency)
        self.time_embed = nn.Linear(64, hidden_size)
        self.gap_embed = nn.Linear(64, hidden_size, bias=False)
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, hidden_size), nn.SiLU())
        blocks = [Block(hidden_size, num_heads, mlp_ratio) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, in_channels * patch_size**2)
        self.gradient_checkpointing = False
        for layer in (self.gap_embed, self.modulation, self.out, *(b.modulation for b in blocks)):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.scalar_embed = nn.ModuleDict()
        self.add_scalars(scalars or {})

    def add_scalars(self, scalars: Mapping[str, float]) -> None:
        """See :meth:`genkit.denoisers.base.FlowMap.add_scalars`."""
        for name in scalars:
            if name not in self.scalar_embed:
                layer = nn.Linear(64, self.config.hidden_size, bias=False).to(self.gap_embed.weight)
                nn.init.zeros_(layer.weight)
                self.scalar_embed[name] = layer
        if scalars:
            set_config(self, scalars={**(self.config.scalars or {}), **scalars})

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        class_labels: Tensor | None = None,
        scalars: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Average velocity, shape of ``x``.

        Args:
            x: ``(B, C, H, W)``.
            t: start times in [0, 1], ``(B,)``, float32 at least.
            s: end times, ``(B,)``; ``None`` for ``s = t``.
            class_labels: int64 ``(B,)``, values up to ``num_classes`` (no class, the default).
            scalars: those that the network embeds, ``(B,)`` each.
        """
        cfg = self.config
        b, c, height, _ = x.shape
        p = cfg.patch_size
        grid = height // p
        tokens = x.reshape(b, c, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5).reshape(b, grid * grid, c * p * p)
        dtype = self.embed.weight.dtype  # Diffusers' own attribute walks all weights
        h = self.embed((tokens / cfg.sigma_data).to(dtype)) + self.position
        emb = self.time_embed(self.time_features(t).to(dtype))
        if s is not None:
            emb = emb + self.gap_embed(self.time_features(t - s).to(dtype))
        for name, layer in self.scalar_embed.items():
            emb = emb + layer(self.time_features(scalars[name]).to(dtype))  # type: ignore[index]
        if self.class_embed is not None:
            if class_labels is None:
                class_labels = torch.full((b,), cfg.num_classes, device=x.device)
            emb = emb + self.class_embed(class_labels)
        emb = self.mix(emb)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, h, emb)
            else:
                h = block(h, emb)
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=-1)
        h = self.out(torch.addcmul(shift, self.norm(h), 1 + scale)) * cfg.sigma_data
        return h.view(b, grid, grid, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
