"""Small random models as the published files lay them out, written from their papers, apart from what is tested."""

import math
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


def randomised(module: nn.Module) -> nn.Module:
    """Weights drawn anew, always the same, and none of them zero or one, as some are born."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            width = math.prod(parameter.shape[1:])  # what comes in
            born = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0  # a norm's
            parameter.copy_(born + torch.randn(parameter.shape, generator=random) * (0.3 if born else width**-0.5))
    return module.eval().requires_grad_(False)


class _OpenBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, 2 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(2 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class _Blocks(nn.Module):
    def __init__(self, width, heads, layers=2):
        super().__init__()
        self.resblocks = nn.ModuleList([_OpenBlock(width, heads) for _ in range(layers)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _OpenVision(nn.Module):
    def __init__(self, width, heads, patch, size, out):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Blocks(width, heads)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """A CLIP by the names of OpenCLIP; heads as wide as in a ViT-H-14."""

    def __init__(self, vocabulary: int, size: int = 28, length: int = 77, out: int = 24):
        super().__init__()
        width = 128
        self.visual = _OpenVision(160, 2, 14, size, out)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.transformer = _Blocks(width, 2)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.register_buffer("attn_mask", torch.full((length, length), -math.inf).triu(1))
        randomised(self)

    def read(self, tokens):
        """Tokens ``(B, N)``, end-of-text being the largest, to features."""
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.attn_mask))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection

    def forward(self, pixels, tokens):
        return F.cosine_similarity(self.visual(pixels), self.read(tokens))


def _attend(q, k, v, heads, mask=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class _ViTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, -1)
        x = x + self.attn["proj"](_attend(q, k, v, self.heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _ViT(nn.Module):
    def __init__(self, width, heads, patch, size, layers=2):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList([_ViTBlock(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, pixels):
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def _dense_and_norm(inner, width):
    return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, 1e-12)})


class _BertAttention(nn.Module):
    def __init__(self, width, heads, seen):
        super().__init__()
        self.heads = heads
        names = {"query": width, "key": seen, "value": seen}
        self.self = nn.ModuleDict({name: nn.Linear(n, width) for name, n in names.items()})
        self.output = _dense_and_norm(width, width)

    def forward(self, x, context, mask=None):
        q, k, v = self.self["query"](x), self.self["key"](context), self.self["value"](context)
        return self.output["LayerNorm"](x + self.output["dense"](_attend(q, k, v, self.heads, mask)))


class _BertLayer(nn.Module):
    def __init__(self, width, heads, seen):
        super().__init__()
        self.attention = _BertAttention(width, heads, width)
        self.crossattention = _BertAttention(width, heads, seen)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 3 * width)})
        self.output = _dense_and_norm(3 * width, width)

    def forward(self, x, seen, mask):
        x = self.crossattention(self.attention(x, x, mask), seen)
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class _Bert(nn.Module):
    def __init__(self, vocabulary, width, heads, seen, layers=2):
        super().__init__()
        tables = {"word_embeddings": vocabulary, "position_embeddings": 64}
        self.embeddings = nn.ModuleDict({name: nn.Embedding(n, width) for name, n in tables.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(width, 1e-12)
        self.embeddings.register_buffer("position_ids", torch.arange(64)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([_BertLayer(width, heads, seen) for _ in range(layers)])})

    def forward(self, tokens, mask, seen):
        x = self.embeddings["word_embeddings"](tokens)
        x = x + self.embeddings["position_embeddings"].weight[: tokens.shape[1]]
        x = self.embeddings["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x, seen, mask[:, None, None].bool())
        return x


class _Head(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        pairs = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        dropped = [nn.Dropout(p) for p in (0.2, 0.2, 0.1)]
        self.layers = nn.Sequential(
            pairs[0], dropped[0], pairs[1], dropped[1], pairs[2], dropped[2], pairs[3], pairs[4]
        )

    def forward(self, x):
        return self.layers(x)[:, 0]


def head(width: int) -> nn.Module:
    """Five linear layers with dropout between, as both published heads have them."""
    return randomised(_Head(width, 24, 12, 8, 4, 1))


class ImageRewardNet(nn.Module):
    """ImageReward by the names of its code; heads of attention as wide as there."""

    def __init__(self, vocabulary: int, size: int = 16):
        super().__init__()
        self.blip = nn.Module()
        self.blip.visual_encoder = _ViT(192, 3, 8, size)
        self.blip.text_encoder = _Bert(vocabulary, 128, 2, 192)
        self.blip.vision_proj = nn.Linear(192, 8)  # of the pretraining, not part of the reward
        self.mlp = head(128)
        randomised(self)

    def forward(self, pixels, tokens, mask):
        read = self.blip.text_encoder(tokens, mask, self.blip.visual_encoder(pixels))
        return (self.mlp(read[:, 0]) - 0.16717362830052426) / 1.0333394966054072
