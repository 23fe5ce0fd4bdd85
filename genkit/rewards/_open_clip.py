"""The weights of OpenCLIP's models as transformers names them."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genkit.rewards._loading import num_layers

_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's state dict by the names of transformers' ``CLIPModel``; projections are stored the other way round."""
    result = {}
    for key, value in state.items():
        if key == "attn_mask":  # transformers makes its own
            continue
        name = key
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if key in ("visual.proj", "text_projection"):
            value = value.T
        if ".attn.in_proj_" in name:
            stem, kind = name.split(".attn.in_proj_")
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                result[f"{stem}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
        else:
            result[name] = value.contiguous()
    return result


def clip_config(state: Mapping[str, Tensor], *, vision_head: int, text_head: int, end: int) -> Any:
    """The ``CLIPConfig`` of a state dict of OpenCLIP, and what its shapes do not tell.

    Args:
        vision_head, text_head: widths of an attention head.
        end: the end-of-text token.

    Raises:
        ValueError: this is no such state dict.
    """
    from transformers import CLIPConfig

    try:
        conv, places = state["visual.conv1.weight"], state["visual.positional_embedding"]
        vocabulary, positions = state["token_embedding.weight"], state["positional_embedding"]
        common = dict(hidden_act="gelu", layer_norm_eps=1e-5)
        vision = common | dict(
            hidden_size=conv.shape[0],
            num_hidden_layers=num_layers(state, "visual.transformer.resblocks."),
            num_attention_heads=conv.shape[0] // vision_head,
            intermediate_size=len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
            patch_size=conv.shape[-1],
            image_size=math.isqrt(len(places) - 1) * conv.shape[-1],
        )
        text = common | dict(
            vocab_size=len(vocabulary),
            hidden_size=vocabulary.shape[1],
            num_hidden_layers=num_layers(state, "transformer.resblocks."),
            num_attention_heads=vocabulary.shape[1] // text_head,
            intermediate_size=len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
            max_position_embeddings=len(positions),
            eos_token_id=end,
        )
        width = state["text_projection"].shape[1]
    except KeyError as error:
        raise ValueError(f"weights without {error}; accepted are those of an OpenCLIP model with a ViT") from error
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
