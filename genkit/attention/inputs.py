"""What attention is given, checked and brought into one form."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


@dataclass(frozen=True)
class Options:
    """``scale`` of the scores, and whether query ``i`` sees keys ``j <= i`` only."""

    scale: float
    is_causal: bool


class Inputs(NamedTuple):
    """``mask`` and ``bias`` have four axes, of which those that are broadcast to ``(B, H, M, N)`` have size 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    options: Options


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: bool, scale: float | None
) -> Inputs:
    """Raises ValueError with what is wrong and what is accepted; applies autocast, as PyTorch's own attention does."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (batch, heads, tokens, channels)")
    for name, given in (("q", q), ("k", k), ("v", v), ("bias", bias)):
        _floating(name, given)
    if autocasts(q.device):
        lower = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(lower) if x.dtype != torch.float64 else x for x in (q, k, v))
        bias = bias.to(lower) if bias is not None and bias.dtype != torch.float64 else bias
    for name, other in (("k", k), ("v", v), ("mask", mask), ("bias", bias)):
        if other is not None and name != "mask" and other.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype} and {name} is {other.dtype}; give both in one dtype")
        if other is not None and other.device != q.device:
            raise ValueError(f"q is on {q.device} and {name} on {other.device}; bring both to one device")
    b, h, m, d = q.shape
    n = k.shape[2]
    if k.shape[0] != b or v.shape[0] != b:
        raise ValueError(f"q, k and v have batches of {b}, {k.shape[0]} and {v.shape[0]}; expected one size")
    if k.shape[3] != d:
        raise ValueError(f"q has {d} channels a head and k {k.shape[3]}; expected as many")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"k has (heads, tokens) {tuple(k.shape[1:3])} and v {tuple(v.shape[1:3])}; expected the same")
    if not k.shape[1] or h % k.shape[1]:
        raise ValueError(f"q has {h} heads and k {k.shape[1]}; expected a divisor of q's")
    if not n:
        raise ValueError("k has no tokens; expected at least one")
    if is_causal and m != n:
        raise ValueError(
            f"is_causal=True with {m} queries and {n} keys: libraries disagree on which corner the triangle starts in; "
            "give it as a boolean mask, torch.ones(M, N, dtype=torch.bool).tril(diagonal), diagonal 0 for torch's "
            "convention and N - M for that of flash-attn"
        )
    full = (b, h, m, n)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {mask.dtype}; expected torch.bool, True where attended; an additive one is a bias"
            )
        mask = _broadcast("mask", mask, full)
    if bias is not None:
        bias = _broadcast("bias", bias, full)
    if isinstance(scale, Tensor) and (scale.requires_grad or _moves(scale)):
        raise ValueError("scale is a tensor whose derivatives would be lost; give a number, or multiply q by it")
    scale = d**-0.5 if scale is None else float(scale)
    return Inputs(q, k, v, mask, bias, Options(scale, bool(is_causal)))


def check_tangents(inputs: Inputs, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, tbias: Tensor | None):
    """Tangents as their primals are, or ``None``, with ``tbias`` broadcast like the bias. Raises ValueError."""
    if tbias is not None and inputs.bias is None:
        raise ValueError("tbias was given without a bias; give a bias of zeros with it")
    if tbias is not None:
        tbias = _broadcast("tbias", tbias, tuple(inputs.bias.shape)).expand(inputs.bias.shape)  # type: ignore[union-attr]
    moved = []
    for name, x, tx in zip(("q", "k", "v", "bias"), (*inputs[:3], inputs.bias), (tq, tk, tv, tbias), strict=True):
        if x is not None and tx is not None:
            if tx.shape != x.shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)} and its tangent {tuple(tx.shape)}; give one shape")
            if tx.device != x.device:
                raise ValueError(f"{name} is on {x.device} and its tangent on {tx.device}; bring both to one device")
            _floating(f"the tangent of {name}", tx)
            tx = tx.to(x.dtype) if autocasts(x.device) else tx
            if tx.dtype != x.dtype:
                raise ValueError(f"{name} is {x.dtype} and its tangent {tx.dtype}; give both in one dtype")
        moved.append(tx)
    return tuple(moved)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there; on some devices, such as ``meta``, there is none."""
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# torch.compile takes what it says as given: up to torch 2.11 it cannot look into the function that this asks.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _moves(x: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _floating(name: str, x: Tensor | None) -> None:
    if x is not None and x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        more = "; a boolean one is a mask" if name == "bias" and x.dtype == torch.bool else ""
        raise ValueError(f"{name} is {x.dtype}; expected float16, bfloat16, float32 or float64{more}")


def _broadcast(name: str, x: Tensor, full: tuple[int, ...]) -> Tensor:
    b, h, m, n = full
    given = tuple(x.shape)
    if b > 1 and given == (b, n):
        if m == b:
            raise ValueError(
                f"{name} of shape {given} may be (queries, keys) or (batch, keys), as many of both; "
                f"give it as (1, 1, {m}, {n}) or as ({b}, 1, 1, {n})"
            )
        x = x[:, None, None]  # keys that are padding
    x = x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x
    if x.ndim > 4 or any(size not in (1, whole) for size, whole in zip(x.shape, full, strict=True)):
        raise ValueError(
            f"{name} of shape {given} does not broadcast to (batch, heads, queries, keys) = {full}; keys of a "
            f"batch are masked by ({b}, {n})"
        )
    return x
