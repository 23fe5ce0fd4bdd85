"""Attention in plain PyTorch, in float32 at least: any device, every derivative of any order, quadratic memory."""

import torch
from torch import Tensor

from genkit.attention.inputs import Inputs


def attention(inputs: Inputs) -> Tensor:
    """``softmax(scale q k^T + bias) v``; 0 in rows of which nothing is attended to."""
    dtype = inputs.q.dtype
    with torch.autocast(inputs.q.device.type, enabled=False):
        v = _wide(inputs.v)
        return _values(_probabilities(inputs), v).to(dtype)


def attention_with_tangent(
    inputs: Inputs, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, tbias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(p v, (p * (t - mu)) v + p tv)`` with ``t = scale (tq k^T + q tk^T) + tbias`` and ``mu = sum p * t``."""
    dtype = inputs.q.dtype
    with torch.autocast(inputs.q.device.type, enabled=False):
        q, k, v = _wide(inputs.q), _wide(inputs.k), _wide(inputs.v)
        p = _probabilities(inputs)
        t: Tensor | None = None
        for a, b in ((tq, k), (q, tk)):
            if a is not None and b is not None:
                part = _scores(_wide(a), _wide(b)) * inputs.options.scale
                t = part if t is None else t + part
        if tbias is not None:
            t = _wide(tbias) if t is None else t + _wide(tbias)
        tangent = None
        if t is not None:
            tangent = _values(p * (t - (p * t).sum(-1, keepdim=True)), v)
        if tv is not None:
            moved = _values(p, _wide(tv))
            tangent = moved if tangent is None else tangent + moved
        o = _values(p, v)
        tangent = torch.zeros_like(o) if tangent is None else tangent
        return o.to(dtype), tangent.to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _probabilities(inputs: Inputs) -> Tensor:
    s = _scores(_wide(inputs.q), _wide(inputs.k)) * inputs.options.scale
    if inputs.bias is not None:
        s = s + _wide(inputs.bias)
    seen = inputs.mask
    if inputs.options.is_causal:
        causal = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        seen = causal if seen is None else seen & causal
    if seen is not None:
        s = torch.where(seen, s, float("-inf"))
    high = s.detach().amax(-1, keepdim=True)  # cancels, so it is a constant
    e = torch.exp(s - torch.where(high == float("-inf"), 0.0, high))
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total == 0, 1.0, total)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """``q k^T`` where each head of ``k`` serves as many neighbouring heads of ``q``."""
    if q.shape[1] == k.shape[1]:
        return q @ k.transpose(-2, -1)
    return (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-2, -1)).flatten(1, 2)


def _values(p: Tensor, v: Tensor) -> Tensor:
    if p.shape[1] == v.shape[1]:
        return p @ v
    return (p.unflatten(1, (v.shape[1], -1)) @ v[:, :, None]).flatten(1, 2)
