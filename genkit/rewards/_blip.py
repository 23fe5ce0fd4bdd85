"""The weights of BLIP's image encoder and of its BERT as transformers names them."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.rewards._loading import num_layers

_HEAD = 64  # width of an attention head, in ViTs and in BERT
_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
)


def vision_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BLIP's ``visual_encoder`` by the names of ``BlipVisionModel``."""
    result = {}
    for key, value in state.items():
        for pattern, replacement in _VISION:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def text_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BLIP's ``text_encoder`` by the names of ``BlipTextModel``: the same, but positions are not stored."""
    return {key: value for key, value in state.items() if key != "embeddings.position_ids"}


def vision_config(state: Mapping[str, Tensor]) -> Any:
    """The ``BlipVisionConfig`` of a ``visual_encoder``."""
    from transformers import BlipVisionConfig

    width, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=num_layers(state, "blocks."),
        num_attention_heads=width // _HEAD,
        patch_size=patch,
        image_size=math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
        layer_norm_eps=1e-6,
    )


def text_config(state: Mapping[str, Tensor]) -> Any:
    """The ``BlipTextConfig`` of a ``text_encoder`` with cross-attention."""
    from transformers import BlipTextConfig

    vocabulary = state["embeddings.word_embeddings.weight"]
    return BlipTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=vocabulary.shape[1],
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=num_layers(state, "encoder.layer."),
        num_attention_heads=vocabulary.shape[1] // _HEAD,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        is_decoder=True,  # has cross-attention; it attends in both directions all the same
    )
