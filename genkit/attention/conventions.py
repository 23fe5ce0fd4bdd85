"""How Diffusers and Transformers call attention, and how PyTorch does: from each way to the others."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from genkit.attention.sdpa import scaled_dot_product_attention


def as_diffusers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Ours as a backend of Diffusers' dispatcher: ``(B, N, H, D)``, masks ``(B, N)`` of keys or of four axes.

    Raises:
        ValueError: ``return_lse``, context parallelism, causality with fewer or more queries than keys, dropout,
            heads that differ without ``enable_gqa``.
    """
    attn_mask = _checked("genkit", query, key, attn_mask, is_causal, return_lse, _parallel_config)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    o = scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return o.transpose(1, 2)


def _checked(name, query, key, attn_mask, is_causal, return_lse, parallel) -> Tensor | None:
    """The mask in four axes, after a check of what Diffusers' dispatcher may ask beyond PyTorch's arguments."""
    if return_lse:
        raise ValueError(f"return_lse=True: attention backend {name!r} returns no log-sum-exp; choose 'flash' for it")
    if parallel is not None:
        raise ValueError(
            f"attention backend {name!r} does not split sequences over devices (context parallelism); choose 'native'"
        )
    if is_causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"is_causal=True with {query.shape[1]} queries and {key.shape[1]} keys: Diffusers' backends disagree on "
            "which corner the triangle starts in; give attn_mask, boolean, (1, 1, queries, keys)"
        )
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        return attn_mask[:, None, None]
    return attn_mask


_ARGUMENTS = ("attn_mask", "dropout_p", "is_causal", "scale")


@cache
def of_user(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A user's function as a backend of Diffusers' dispatcher, which drops what a signature does not name."""
    parameters = inspect.signature(function).parameters
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    takes = {n for n in (*_ARGUMENTS, "enable_gqa") if every or n in parameters}

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        attn_mask = _checked(name, query, key, attn_mask, is_causal, return_lse, _parallel_config)
        given = _taken(name, takes, attn_mask, dropout_p, is_causal, scale)
        if enable_gqa and "enable_gqa" in takes:
            given["enable_gqa"] = True
        elif enable_gqa:
            key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
        return _with_tangent(name, function(query, key, value, **given), query, key, value)

    attend.takes = takes  # type: ignore[attr-defined]
    return attend


def _taken(name: str, takes: set[str], *values: Any) -> dict[str, Any]:
    """The arguments that a backend takes; what it does not take is refused where it is asked for."""
    mask, dropout, is_causal, scale = values
    for argument, asked in zip(_ARGUMENTS, (mask is not None, dropout > 0, is_causal, scale is not None), strict=True):
        if asked and argument not in takes:
            raise ValueError(f"attention backend {name!r} has no {argument}; choose 'native' or 'genkit'")
    return {argument: value for argument, value in zip(_ARGUMENTS, values, strict=True) if argument in takes}


def from_diffusers(name: str, function: Callable, takes: set[str]) -> Callable[..., Tensor]:
    """A backend of Diffusers, called as PyTorch's attention. What it does not take is refused, not dropped."""

    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        given = _taken(name, takes, attn_mask, dropout_p, is_causal, scale)
        if query.ndim == 3:  # of one head
            mask = attn_mask[:, None] if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
            q, k, v = (x[:, None] for x in (query, key, value))
            return compute(q, k, v, mask, dropout_p, is_causal, scale)[:, 0]
        if query.shape[1] != key.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        o = function(*(x.transpose(1, 2) for x in (query, key, value)), **given).transpose(1, 2)
        return _with_tangent(name, o, query, key, value)

    return compute


class LostTangent(RuntimeError):
    """A backend was given tangents and returned none, which PyTorch takes for a tangent of zero."""


def _with_tangent(name: str, o: Tensor, *inputs: Tensor) -> Tensor:
    if forward_ad._current_level >= 0 and not _moves(o) and any(map(_moves, inputs)):
        raise LostTangent(f"attention backend {name!r} loses tangents; take 'genkit', by use(model, tangent=True)")
    return o


def _moves(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def from_transformers(compute: Callable[..., Tensor]) -> Callable:
    """A function for Transformers' ``AttentionInterface`` that calls ``compute``, as PyTorch's is called.

    As with Transformers' own: a mask holds the causality where there is one, and one query sees all keys; the module
    says whether it is causal where the call does not.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        for name in ("softcap", "s_aux", "cache", "output_attentions"):
            if others.get(name) is not None and others[name] is not False:
                raise ValueError(f"{name} is for attn_implementation='eager'; {type(module).__name__} asks for it")
        m, n = query.shape[2], key.shape[2]
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        causal = causal and attention_mask is None and m > 1
        if causal and n > m:  # a static cache that is empty: the keys behind are not there yet
            key, value, n = key[:, :, :m], value[:, :, :m], m
            position_bias = None if position_bias is None else position_bias[..., :m]
        if position_bias is not None:
            if causal:
                attention_mask, causal = torch.ones(m, n, dtype=torch.bool, device=query.device).tril(), False
            attention_mask = _added(position_bias, attention_mask)
        grouped = query.shape[1] != key.shape[1]
        o = compute(query, key, value, attention_mask, dropout, causal, scaling, enable_gqa=grouped)
        return o.transpose(1, 2).contiguous(), None

    return attend


def _added(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask
