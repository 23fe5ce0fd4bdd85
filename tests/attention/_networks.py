"""Tiny networks of every kind that backends get into, each as a function of one tensor."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

NAMES = ("flux", "sd3", "dit", "unet", "clip_text", "clip_vision", "llama")


class Network(NamedTuple):
    module: nn.Module
    call: Callable[[Tensor], Tensor]
    x: Tensor
    calls: int  # of attention, in one forward


def build(name: str, tiny_pipeline) -> Network:
    """On the CPU in float32, in eval mode; the two of Transformers' have padding on the left, or none."""
    return globals()[f"_{name}"](tiny_pipeline)


def _flux(tiny_pipeline) -> Network:
    m = tiny_pipeline("flux").transformer

    def call(x):
        one = torch.ones(2)
        return m(
            hidden_states=x,
            timestep=0.3 * one,
            guidance=one,
            pooled_projections=_draw(2, 32),
            encoder_hidden_states=_draw(2, 5, 32),
            txt_ids=torch.zeros(5, 3),
            img_ids=torch.arange(27.0).view(9, 3),
        ).sample

    return Network(m, call, _draw(2, 9, 16, seed=1), 2)


def _sd3(tiny_pipeline) -> Network:
    m = tiny_pipeline("sd3").transformer
    given = dict(
        encoder_hidden_states=_draw(2, 5, 64), pooled_projections=_draw(2, 64), timestep=torch.tensor([3, 500])
    )
    return Network(m, lambda x: m(x, **given).sample, _draw(2, 4, 8, 8, seed=1), 2)


def _dit(tiny_pipeline) -> Network:
    m = tiny_pipeline("dit").transformer
    given = dict(timestep=torch.tensor([3, 500]), class_labels=torch.tensor([1, 2]))
    return Network(m, lambda x: m(x, **given).sample, _draw(2, 4, 16, 16, seed=1), 2)


def _unet(tiny_pipeline) -> Network:
    m = tiny_pipeline("sd15").unet
    text, mask = _draw(2, 5, 32), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def call(x):
        return m(x, torch.tensor([3, 500]), encoder_hidden_states=text, encoder_attention_mask=mask).sample

    return Network(m, call, _draw(2, 4, 8, 8, seed=1), 8)


def _clip_text(tiny_pipeline) -> Network:
    m = tiny_pipeline("sd15").text_encoder
    ids, mask = torch.arange(14).view(2, 7), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    (name, table) = next((name, p) for name, p in m.named_parameters() if name.endswith("token_embedding.weight"))

    def call(x):
        return torch.func.functional_call(m, {name: x}, (ids, mask)).last_hidden_state[mask.bool()]

    return Network(m, call, table.detach().clone(), 2)


def _clip_vision(tiny_pipeline) -> Network:
    sizes = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2)
    m = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4, hidden_act="gelu")).eval()
    return Network(m, lambda x: m(x).last_hidden_state, _draw(2, 3, 8, 8, seed=1), 2)


def _llama(tiny_pipeline) -> Network:
    sizes = dict(hidden_size=64, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
    m = LlamaModel(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=11)).eval()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])

    def call(x):
        return m(inputs_embeds=x, attention_mask=mask).last_hidden_state[mask.bool()]

    return Network(m, call, _draw(2, 6, 64, seed=1), 2)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settings(module):
    """Everything that ``use`` may change."""
    found = [attention_dispatch._AttentionBackendRegistry._active_backend]
    for part in module.modules():
        found += [type(part), getattr(part, "processor", None)]
        found += [dict(vars(part.processor)) if hasattr(getattr(part, "processor", None), "__dict__") else None]
        found += [getattr(getattr(part, "config", None), "_attn_implementation", None)]
    return found
