"""A masked autoregressive transformer over continuous tokens, whose last layers are a small diffusion model."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.checks import check_counts


class Block(nn.Module):
    """``h + Attention(LayerNorm h)``, then ``h + MLP(LayerNorm h)``; every token sees all others."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        b, n, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        h = h + self.drop(self.proj(x.transpose(1, 2).reshape(b, n, d)))
        return h + self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm2(h))))))


class HeadBlock(nn.Module):
    """``x + gate * MLP(LayerNorm(x) (1 + scale) + shift)``, modulated by the embedding ``y``."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.modulation = nn.Linear(dim, 3 * dim)
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(y)).chunk(3, dim=-1)
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return torch.addcmul(x, gate, self.fc2(F.silu(self.fc1(h))))


class SimpleMLPAdaLN(nn.Module):
    """The head: noise and variance of noisy tokens, each token by itself, under the transformer's output for it.

    Computes in the type of its weights, autocast or not: its timesteps near pure noise need more digits than half
    precision has.

    Args:
        channels: of a token.
        condition_channels: of the transformer's output.
        width, num_layers: of the residual blocks.
    """

    frequencies: Tensor

    def __init__(self, channels: int, condition_channels: int, width: int, num_layers: int):
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.time_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.condition_embed = nn.Linear(condition_channels, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, 2 * channels)
        frequencies = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def start(self) -> None:
        """Small weights for the time, none for what modulates and for the output."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("time_embed"):
                nn.init.normal_(module.weight, std=0.02)
            elif name.endswith(("modulation", "out")):
                nn.init.zeros_(module.weight)

    def forward(self, x: Tensor, timestep: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and variance logits, of the shape of ``x``.

        Args:
            x: noisy tokens ``(..., D)``.
            timestep: 0 to 999, ``(...)`` or a shape that broadcasts to it.
            z: output of the transformer, ``(..., E)``, or a shape that broadcasts to it.
        """
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.out.weight.dtype
            angle = timestep[..., None] * self.frequencies.to(dtype)
            time = self.time_embed(torch.cat((angle.cos(), angle.sin()), dim=-1))
            y = time + self.condition_embed(z.to(dtype))
            h = self.embed(x.to(dtype))
            for block in self.blocks:
                h = block(h, y)
            shift, scale = self.modulation(F.silu(y)).chunk(2, dim=-1)
            epsilon, logits = self.out(torch.addcmul(shift, self.norm(h), 1 + scale)).chunk(2, dim=-1)
        return epsilon, logits


class MAR(ModelMixin, ConfigMixin):
    """``z_i`` of every token given a class and the tokens that are known; ``p(token_i | z_i)`` is ``head``'s.

    The encoder sees the known tokens alone, beside ``buffer_size`` slots that hold the class; the decoder sees what it
    made of them, and a learned token at all other places.

    Args:
        sample_size: side of the square image or latent.
        in_channels, patch_size: a token is a patch, ``in_channels * patch_size^2`` numbers.
        num_classes: class labels ``0 .. num_classes - 1``; label ``num_classes`` means "no class".
        hidden_size, num_heads: of encoder and decoder.
        num_layers: of the encoder; the decoder has as many.
        head_width, head_layers: of the diffusion head.
        buffer_size: slots that hold the class, at least one, or nothing would say which it is.
        dropout: of attention and of what attention and feed-forward layers add.

    Raises:
        ValueError: a number below 1, or sizes that do not divide each other.

    Source: Li et al., "Autoregressive image generation without vector quantization", arXiv 2406.11838.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["head"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        patch_size: int = 2,
        num_classes: int = 10,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        head_width: int = 256,
        head_layers: int = 3,
        buffer_size: int = 8,
        dropout: float = 0.1,
    ):
        super().__init__()
        check_counts(sample_size=sample_size, in_channels=in_channels, patch_size=patch_size, num_classes=num_classes)
        check_counts(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, buffer_size=buffer_size)
        check_counts(head_width=head_width, head_layers=head_layers)
        if sample_size % patch_size:
            raise ValueError(f"sample_size={sample_size} is not a multiple of patch_size={patch_size}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}")
        length, channels = (sample_size // patch_size) ** 2, in_channels * patch_size**2
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        self.embed = nn.Linear(channels, hidden_size)
        self.encoder_position = nn.Parameter(torch.empty(1, buffer_size + length, hidden_size))
        self.embed_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.encoder = nn.ModuleList(Block(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.encoder_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.decoder_embed = nn.Linear(hidden_size, hidden_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.decoder_position = nn.Parameter(torch.empty(1, buffer_size + length, hidden_size))
        self.decoder = nn.ModuleList(Block(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.decoder_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.head_position = nn.Parameter(torch.empty(1, length, hidden_size))
        self.head = SimpleMLPAdaLN(channels, hidden_size, head_width, head_layers)
        self.gradient_checkpointing = False
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        positions = (self.encoder_position, self.decoder_position, self.head_position)
        for weight in (self.class_embed.weight, self.mask_token, *positions):
            nn.init.normal_(weight, std=0.02)
        self.head.start()

    def forward(self, tokens: Tensor, visible: Tensor, class_labels: Tensor) -> Tensor:
        """``z`` ``(B, L, E)`` of all tokens, row by row.

        Args:
            tokens: ``(B, L, D)``; those that are not visible do not matter.
            visible: places of the tokens that are known, int64 ``(B, n)``, ``0 <= n <= L``, no place twice.
            class_labels: int64 ``(B,)``, values up to ``num_classes`` (no class).
        """
        buffer, length = self.config.buffer_size, self.head_position.shape[1]
        b, width = len(tokens), self.config.hidden_size
        if tokens.shape[1:] != (length, self.embed.in_features):
            wanted = (b, length, self.embed.in_features)
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected {wanted}")
        index = visible[..., None]
        known = self.embed(tokens.gather(1, index.expand(-1, -1, tokens.shape[2])).to(self.embed.weight.dtype))
        h = torch.cat((self.class_embed(class_labels)[:, None].expand(-1, buffer, -1), known), dim=1)
        index = index.expand(-1, -1, width)
        places = self.encoder_position.expand(b, -1, -1)
        h = h + torch.cat((places[:, :buffer], places[:, buffer:].gather(1, index)), dim=1)
        h = self.decoder_embed(self.encoder_norm(self._through(self.encoder, self.embed_norm(h))))
        all_tokens = self.mask_token.to(h.dtype).expand(b, length, -1).scatter(1, index, h[:, buffer:])
        h = torch.cat((h[:, :buffer], all_tokens), dim=1) + self.decoder_position
        return self.decoder_norm(self._through(self.decoder, h))[:, buffer:] + self.head_position

    def _through(self, blocks: nn.ModuleList, h: Tensor) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, h)
            else:
                h = block(h)
        return h
