"""The formulas that the kernels compute, in plain PyTorch without autograd, with the kernels' signatures."""

import torch
from torch import Tensor

from genkit.attention.inputs import Options


def _seen(q, k, mask, options):
    m, n = q.shape[2], k.shape[2]
    seen = torch.ones(m, n, dtype=torch.bool)
    if options.is_causal:
        seen = seen.tril()
    return seen if mask is None else seen & mask


def _heads(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _gathered(dx, k):
    """Sums over the heads of q that one of k serves."""
    return dx.unflatten(1, (k.shape[1], -1)).sum(2)


def _reduced(dx, like):
    return dx.sum_to_size(like.shape)


def _p(q, k, bias, mask, options, lse=None):
    s = options.scale * q @ _heads(k, q).mT
    if bias is not None:
        s = s + bias
    s = s.masked_fill(~_seen(q, k, mask, options), float("-inf"))
    lse = s.logsumexp(-1) if lse is None else lse
    p = torch.where(lse[..., None] == float("-inf"), 0.0, (s - lse[..., None]).exp())
    return p, lse


def _t(q, k, tq, tk, tbias, options):
    t = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    if tq is not None:
        t = t + options.scale * tq @ _heads(k, q).mT
    if tk is not None:
        t = t + options.scale * q @ _heads(tk, q).mT
    return t if tbias is None else t + tbias


def forward(q: Tensor, k: Tensor, v: Tensor, bias, mask, options: Options):
    p, lse = _p(q, k, bias, mask, options)
    return p @ _heads(v, q), lse


def tangent(q, k, v, bias, mask, lse, tq, tk, tv, tbias, options, precise):
    p, _ = _p(q, k, bias, mask, options, lse)
    t = _t(q, k, tq, tk, tbias, options)
    mu = (p * t).sum(-1)
    to = (p * (t - mu[..., None])) @ _heads(v, q)
    if tv is not None:
        to = to + p @ _heads(tv, q)
    return to, mu, p @ _heads(v, q) if precise else None, None


def forward_with_tangent(q, k, v, bias, mask, tq, tk, tv, tbias, options, precise):
    o, lse = forward(q, k, v, bias, mask, options)
    to, mu, _, _ = tangent(q, k, v, bias, mask, lse, tq, tk, tv, tbias, options, precise)
    return o, to, lse, mu, None, None


def backward(q, k, v, bias, mask, o, lse, g, options, needs):
    p, _ = _p(q, k, bias, mask, options, lse)
    ds = p * (g @ _heads(v, q).mT - (g * o).sum(-1, keepdim=True))
    dq, dk = options.scale * ds @ _heads(k, q), options.scale * ds.mT @ q
    dk, dv = _gathered(dk, k), _gathered(p.mT @ g, v)
    return _needed(needs, dq, dk, dv, _reduced(ds, bias) if needs[3] else None)


def _needed(needs, *grads):
    return tuple(x if needed else None for x, needed in zip(grads, needs, strict=True))


def backward_with_tangent(q, k, v, bias, mask, tq, tk, tv, tbias, o, to, lse, mu, g, h, options, needs):
    p, _ = _p(q, k, bias, mask, options, lse)
    t, mu = _t(q, k, tq, tk, tbias, options), mu[..., None]
    heads = {name: None if x is None else _heads(x, q) for name, x in dict(k=k, v=v, tk=tk, tv=tv).items()}
    om, dl = (h * o).sum(-1, keepdim=True), (h * to).sum(-1, keepdim=True)
    w = h @ heads["v"].mT
    dt = p * (w - om)
    into_p = (w - om) * (t - mu) - dl
    if tv is not None:
        into_p = into_p + h @ heads["tv"].mT
    if g is not None:
        into_p = into_p + g @ heads["v"].mT - (g * o).sum(-1, keepdim=True)
    ds, scale = p * into_p, options.scale
    dq, dk = scale * ds @ heads["k"], scale * ds.mT @ q
    if tk is not None:
        dq = dq + scale * dt @ heads["tk"]
    if tq is not None:
        dk = dk + scale * dt.mT @ tq
    dv = (p * (t - mu)).mT @ h
    if g is not None:
        dv = dv + p.mT @ g
    return _needed(
        needs,
        dq,
        _gathered(dk, k),
        _gathered(dv, v),
        _reduced(ds, bias) if needs[3] else None,
        None if tq is None else scale * dt @ heads["k"],
        None if tk is None else _gathered(scale * dt.mT @ q, k),
        None if tv is None else _gathered(p.mT @ h, v),
        _reduced(dt, tbias) if needs[7] else None,
    )
