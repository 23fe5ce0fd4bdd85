"""A decoder-only transformer over the tokens of a picture, class-conditional."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.checks import check_counts

Cache = list[tuple[Tensor, Tensor]]


def rotary_table(grid: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(1 + grid^2, head_dim / 2)`` of the class position and the cells, row by row.

    Cell ``(r, c)`` turns the pairs ``(x_2i, x_2i+1)`` by ``[r w, c w]`` with ``w_j = 10000^(-4 j / head_dim)``. Both
    are 0 at the class position, whose query and key vanish with them: every cell scores it 0 and still receives its
    value.
    """
    frequencies = 10_000.0 ** (-torch.arange(head_dim // 4, dtype=torch.float64) * 4 / head_dim)
    cell = torch.arange(grid**2)
    angles = torch.cat([place[:, None] * frequencies for place in (cell // grid, cell % grid)], dim=1)
    nothing = torch.zeros(1, head_dim // 2)
    return torch.cat((nothing, angles.cos().float())), torch.cat((nothing, angles.sin().float()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the interleaved pairs of ``x`` ``(B, H, N, D)`` by tables ``(N, D / 2)``, in float32 at least."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """``h + Attention(RMSNorm h)``, then ``h + SwiGLU(RMSNorm h)``."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        hidden = -(-int(8 * dim / 3) // 256) * 256
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None):
        b, n, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            mask = torch.ones(n, k.shape[2], dtype=torch.bool, device=h.device).tril(k.shape[2] - n)
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=past is None)
        h = h + self.drop(self.proj(x.transpose(1, 2).reshape(b, n, d)))
        x = self.norm2(h)
        return h + self.drop(self.w2(F.silu(self.w1(x)) * self.w3(x))), (k, v)


class GPT(ModelMixin, ConfigMixin):
    """``p(token_i | class, token_<i)`` as logits, over the cells of a square grid row by row.

    The output layer starts at zero, so that an untrained network's cross-entropy is ``log(vocab_size)``.

    Args:
        vocab_size: number of tokens.
        sample_size: side of the grid.
        num_classes: class labels ``0 .. num_classes - 1``; label ``num_classes`` means "no class".
        hidden_size, num_layers, num_heads: the head dimension must be a multiple of 4.
        dropout: on embedded tokens and what attention and feed-forward layers add.

    Raises:
        ValueError: a number below 1, or a head dimension that is no multiple of 4.

    Source: Sun et al., "Autoregressive model beats diffusion: Llama for scalable image generation", arXiv 2406.06525.
    """

    _supports_gradient_checkpointing = True
    cos: Tensor
    sin: Tensor

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 17,
        sample_size: int = 8,
        num_classes: int = 10,
        hidden_size: int = 96,
        num_layers: int = 4,
        num_heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        check_counts(vocab_size=vocab_size, sample_size=sample_size, num_classes=num_classes)
        check_counts(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads)
        if hidden_size % (4 * num_heads):
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of 4 num_heads={4 * num_heads}")
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        self.token_embed = nn.Embedding(vocab_size, hidden_size)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.out = nn.Linear(hidden_size, vocab_size, bias=False)
        cos, sin = rotary_table(sample_size, hidden_size // num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.gradient_checkpointing = False
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.out.weight)

    def forward(self, tokens: Tensor, class_labels: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits ``(B, M, V)`` of the token that follows each of the ``M`` positions given.

        Args:
            tokens: int64 ``(B, n)``, from the first cell on, or from where the cache ends.
            class_labels: int64 ``(B,)``, the first position (``M = n + 1``); none where the cache holds it.
            cache: a list to be filled with keys and values; given again, the positions in it need not be.

        Raises:
            ValueError: a class where the cache holds one or none where it does not, more tokens than the grid has.
        """
        start = cache[0][0].shape[2] if cache else 0
        if (class_labels is None) != (start > 0):
            raise ValueError(f"class_labels are the first position, and only that; the cache holds {start} positions")
        positions, most = tokens.shape[1] + (class_labels is not None), len(self.cos)
        if start + positions > most:
            raise ValueError(
                f"tokens {tuple(tokens.shape)} after {start} positions: the grid has {most - 1} tokens in all"
            )
        h = self.drop(self.token_embed(tokens))
        if class_labels is not None:
            h = torch.cat((self.class_embed(class_labels)[:, None], h), dim=1)
        cos, sin = (table[start : start + h.shape[1]] for table in (self.cos, self.sin))
        for i, block in enumerate(self.blocks):
            past = cache[i] if cache and start else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h, present = self._gradient_checkpointing_func(block, h, cos, sin, past)
            else:
                h, present = block(h, cos, sin, past)
            if cache is not None:
                cache[i : i + 1] = [present]
        return self.out(self.norm(h))
