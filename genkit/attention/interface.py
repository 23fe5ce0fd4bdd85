"""Backends in Transformers' networks: its interfaces of attention and of masks."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from genkit.attention import conventions


def implement(network: nn.Module, name: str, own: str | None, compute: Callable, stack: ExitStack) -> list[Any]:
    """Let Transformers' models in ``network`` attend by ``compute``, or by what they call ``own``; ``stack`` undoes it.

    Returns the configs that hold the choice.

    Raises:
        ValueError: a model does not take it, with Transformers' reason.
    """
    wanted = own or _register(name, compute)
    changed: list[Any] = []
    for model in _outermost(network):
        changed += (configs := _configs(model))
        for config in reversed(configs):  # a config hands its setting on to those in it, so they come after it
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        # What Transformers takes by default, where a model has no scaled_dot_product_attention.
        default = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
        try:
            model.set_attn_implementation(default if name == "native" else wanted)
        except ImportError as error:
            raise ValueError(f"backend={name!r}: {error}") from error
    return changed


def _register(name: str, compute: Callable) -> str:
    # Wherever a name has "flash" in it, Transformers gives masks in another form.
    registered = name if name == "genkit" else f"diffusers:{name.replace('flash', 'fl-ash')}"
    AttentionInterface.register(registered, conventions.from_transformers(compute))
    # Without this a name gets no masks at all, and no error.
    AttentionMaskInterface.register(registered, sdpa_mask)
    return registered


def _outermost(network: nn.Module) -> list[PreTrainedModel]:
    if isinstance(network, PreTrainedModel):
        return [network]
    return [model for child in network.children() for model in _outermost(child)]


def _configs(model: PreTrainedModel) -> list[Any]:
    found: list[Any] = []
    todo: list[Any] = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    while todo:
        config = todo.pop(0)
        if any(config is other for other in found):
            continue
        found.append(config)
        todo += [part for key in config.sub_configs if (part := getattr(config, key, None)) is not None]
    return found
