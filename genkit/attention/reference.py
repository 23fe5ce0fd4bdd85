"""Attention in plain PyTorch, in float32 at least: any device, every derivative of any order, quadratic memory."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genkit.attention.inputs import Inputs, autocasts


def attention(inputs: Inputs) -> Tensor:
    """``softmax(scale q k^T + bias) v``; 0 in rows of which nothing is attended to."""
    dtype = inputs.q.dtype
    with _as_given(inputs.q):
        v = _wide(inputs.v)
        return _values(_probabilities(inputs), v).to(dtype)


def attention_with_tangent(
    inputs: Inputs, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, tbias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(p v, (p * (t - mu)) v + p tv)`` with ``t = scale (tq k^T + q tk^T) + tbias`` and ``mu = sum p * t``."""
    dtype, scale = inputs.q.dtype, inputs.options.scale
    with _as_given(inputs.q):
        k, v = _wide(inputs.k), _wide(inputs.v)
        p = _probabilities(inputs)
        t = None if tq is None else _scores(_wide(tq) * scale, k)
        if tk is not None:
            t = _sum(t, _scores(_wide(inputs.q) * scale, _wide(tk)))
        if tbias is not None:
            t = _sum(t, _wide(tbias).expand_as(p))
        # p * (t - mu): the Jacobian of softmax is symmetric, so its fused product from the left will do
        tangent = None if t is None else _values(torch._softmax_backward_data(t, p, -1, p.dtype), v)
        if tv is not None:
            tangent = _sum(tangent, _values(p, _wide(tv)))
        o = _values(p, v)
        tangent = torch.zeros_like(o) if tangent is None else tangent
        return o.to(dtype), tangent.to(dtype)


def _as_given(x: Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocasts(x.device) else nullcontext()


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _probabilities(inputs: Inputs) -> Tensor:
    s = _scores(_wide(inputs.q) * inputs.options.scale, _wide(inputs.k))
    if inputs.bias is not None:
        s = s + _wide(inputs.bias)
    if inputs.options.is_causal:
        seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = torch.where(seen, s, float("-inf"))
    if inputs.mask is not None:
        s = torch.where(inputs.mask, s, float("-inf"))
    if forward_ad._current_level >= 0:
        # The rule of softmax overwrites what the gradient of the tangent needs, outside of torch.func.
        high = s.detach().amax(-1, keepdim=True)  # cancels, so it is a constant
        e = torch.exp(s - torch.where(high == float("-inf"), 0.0, high))
        total = e.sum(-1, keepdim=True)
        return e / torch.where(total == 0, 1.0, total)
    if inputs.mask is None and inputs.bias is None:
        return torch.softmax(s, -1)
    return torch.ops.aten._safe_softmax(s, -1)  # 0 in rows of -inf


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """``q k^T`` where each head of ``k`` serves as many neighbouring heads of ``q``."""
    if q.shape[1] == k.shape[1]:
        return q @ k.transpose(-2, -1)
    return (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-2, -1)).flatten(1, 2)


def _values(p: Tensor, v: Tensor) -> Tensor:
    if p.shape[1] == v.shape[1]:
        return p @ v
    return (p.unflatten(1, (v.shape[1], -1)) @ v[:, :, None]).flatten(1, 2)
