"""Dual numbers: exact derivatives along a direction, through ordinary functions and modules of PyTorch.

``x + e dx`` with ``e^2 = 0`` goes through a function as ``f(x) + e f'(x) dx``. A :class:`Dual` carries ``x`` and ``dx``
as two plain tensors, and every PyTorch function that meets one follows its rule below. Unlike ``torch.func.jvp`` this
propagates no tangents where there are none (a flow map's end time reaches a network through its modulations alone),
uses PyTorch's fused derivatives, and records an ordinary graph, which is backpropagated at the cost of two forwards.
Gradient checkpointing, hooks and autocast work as they do on tensors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.attention import attention_with_tangent
from genkit.attention.sdpa import scaled_dot_product_attention


class NoRule(NotImplementedError):
    """A function through which :class:`Dual` does not know its way."""


_recording = False  # whether the derivative under way is to be backpropagated


class Dual:
    """``value + e tangent``, two tensors of one shape; stands in for a tensor in calls of PyTorch functions."""

    def __init__(self, value: Tensor, tangent: Tensor):
        if _recording and not torch.is_grad_enabled():
            # As in the forward of a torch.autograd.Function, whose own backward would never be asked.
            raise NoRule("part of the network runs without gradient, which dual numbers would lose")
        self.value, self.tangent = value, tangent

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # an attribute of a tensor
            return getattr(args[0], func.__self__.__name__)
        rule = _RULES.get(name)
        if rule is None:
            raise NoRule(f"no derivative of {name} is known to dual numbers")
        return rule(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"):
            return getattr(self.value, name)
        if name in ("size", "dim", "numel", "stride", "is_floating_point", "is_contiguous"):
            return getattr(self.value, name)
        if name in _RULES:
            return partial(_RULES[name], self)
        raise NoRule(f"no derivative of Tensor.{name} is known to dual numbers")

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self):
        return iter(self.unbind(0))

    def __getitem__(self, index):
        return Dual(self.value[index], self.tangent[index])

    def __add__(self, other):
        return _add(self, other)

    def __sub__(self, other):
        return _add(self, -other)

    def __rsub__(self, other):
        return _add(-self, other)

    def __neg__(self):
        return Dual(-self.value, -self.tangent)

    def __mul__(self, other):
        return _mul(self, other)

    def __truediv__(self, other):
        return _div(self, other)

    def __rtruediv__(self, other):
        return _div(other, self)

    def __pow__(self, exponent):
        return _pow(self, exponent)

    def __matmul__(self, other):
        return _bilinear(torch.matmul)(self, other)

    __radd__, __rmul__ = __add__, __mul__


def _parts(x: Any) -> tuple[Any, Tensor | None]:
    return (x.value, x.tangent) if isinstance(x, Dual) else (x, None)


def _dual(value: Tensor, *tangents: Tensor | None) -> Dual:
    """``value`` with the sum of the ``tangents`` that there are, broadcast to its shape."""
    tangent = None
    for one in tangents:
        if one is not None:
            tangent = one if tangent is None else tangent + one
    assert tangent is not None
    return Dual(value, tangent.to(value.dtype).expand_as(value))


def _linear_map(func: Callable) -> Callable:
    """The rule of a function that is linear in its first argument, or list of them; others lend shapes and types."""

    def rule(x, *others, **kwargs):
        args = [_parts(a)[0] for a in others]
        if isinstance(x, Tensor):
            return func(x, *args, **kwargs)
        if isinstance(x, (list, tuple)):
            pairs = [_parts(one) for one in x]
            value = func([v for v, _ in pairs], *args, **kwargs)
            tangent = func([torch.zeros_like(v) if dv is None else dv for v, dv in pairs], *args, **kwargs)
        else:
            value, tangent = func(x.value, *args, **kwargs), func(x.tangent, *args, **kwargs)
        return Dual(value, tangent) if isinstance(value, Tensor) else tuple(map(Dual, value, tangent))

    return rule


def _curve(slope: Callable) -> Callable:
    """The rule of an elementwise function; ``slope(x, dx, *settings)`` is its value and its derivative times ``dx``."""

    def rule(x, *args, **kwargs):
        return Dual(*slope(x.value, x.tangent, *args, **kwargs))

    return rule


def _bilinear(func: Callable) -> Callable:
    def rule(a, b):
        (x, dx), (y, dy) = _parts(a), _parts(b)
        return _dual(func(x, y), None if dx is None else func(dx, y), None if dy is None else func(x, dy))

    return rule


def _add(a, b, *, alpha=1) -> Dual:
    (x, dx), (y, dy) = _parts(a), _parts(b)
    return _dual(torch.add(x, y, alpha=alpha), dx, dy if dy is None or alpha == 1 else alpha * dy)


_mul = _bilinear(lambda x, y: x * y)


def _div(a, b) -> Dual:
    (x, dx), (y, dy) = _parts(a), _parts(b)
    value = x / y
    return _dual(value, None if dx is None else dx / y, None if dy is None else -value * dy / y)


def _addcmul(a, b, c, *, value=1) -> Dual:
    (x, dx), (y, dy), (z, dz) = _parts(a), _parts(b), _parts(c)
    tangent = dx
    for one, other in ((dy, z), (y, dz)):
        if one is not None and other is not None:
            add = tangent is not None
            tangent = torch.addcmul(tangent, one, other, value=value) if add else value * one * other  # type: ignore
    return _dual(torch.addcmul(x, y, z, value=value), tangent)


def _linear(x, weight, bias=None) -> Dual:
    return Dual(F.linear(x.value, weight, bias), F.linear(x.tangent, weight))


def _conv2d(x, weight, bias=None, *args, **kwargs) -> Dual:
    return Dual(F.conv2d(x.value, weight, bias, *args, **kwargs), F.conv2d(x.tangent, weight, None, *args, **kwargs))


def _pow(x, exponent) -> Dual:
    return Dual(x.value**exponent, exponent * x.value ** (exponent - 1) * x.tangent)


def _softmax(x, dim, dtype=None, **_) -> Dual:
    p = torch.softmax(x.value, dim, dtype=dtype)
    return Dual(p, torch._softmax_backward_data(x.tangent.to(p.dtype), p, dim, p.dtype))  # symmetric


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5) -> Dual:
    value, mean, scale = torch.native_layer_norm(x.value, shape, None, None, eps)
    # The Jacobian without weights is symmetric, so its fused product from the left will do.
    tangent = torch.ops.aten.native_layer_norm_backward(
        x.tangent.contiguous(), x.value, shape, mean, scale, None, None, [True, False, False]
    )[0]
    if weight is not None:
        value, tangent = value * weight, tangent * weight
    return Dual(value if bias is None else value + bias, tangent)


def _rms_norm(x, shape, weight=None, eps=None) -> Dual:
    axes = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * (x * x).mean(axes, keepdim=True).add(eps).rsqrt()
    return y if weight is None else y * weight


def _group_norm(x, groups, weight=None, bias=None, eps=1e-5) -> Dual:
    def grouped(v):
        return v.reshape(v.shape[0], groups, -1)

    flat = _layer_norm(Dual(grouped(x.value), grouped(x.tangent)), (grouped(x.value).shape[-1],), eps=eps)
    y = flat.reshape(x.shape)
    channels = (1, -1) + (1,) * (x.ndim - 2)
    if weight is not None:
        y = y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


def _attention(q, k, v, mask=None, bias=None, is_causal=False, scale=None, eager=False) -> Dual:
    (q, tq), (k, tk), (v, tv), (bias, tbias) = map(_parts, (q, k, v, bias))
    return Dual(*attention_with_tangent(q, k, v, tq, tk, tv, mask, bias, tbias, is_causal, scale, eager))


def _einsum(equation, *operands) -> Dual:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    values, tangents = zip(*map(_parts, operands), strict=True)
    moved = [
        None if dx is None else torch.einsum(equation, *values[:i], dx, *values[i + 1 :])
        for i, dx in enumerate(tangents)
    ]
    return _dual(torch.einsum(equation, *values), *moved)


def _dropout(x, p=0.5, training=True, inplace=False) -> Dual:
    if p == 0 or not training:
        return x
    kept = F.dropout(torch.ones_like(x.value), p)  # one mask for both
    return Dual(x.value * kept, x.tangent * kept)


def _gelu(x, dx, approximate="none"):
    return F.gelu(x, approximate=approximate), torch.ops.aten.gelu_backward(dx, x, approximate=approximate)


def _silu(x, dx, inplace=False):
    gate = x.sigmoid()
    y = x * gate
    return y, dx * torch.addcmul(gate, y, 1 - gate)


def _root(x, dx):
    y = x.sqrt()
    return y, dx / (2 * y)


def _inverse_root(x, dx):
    y = x.rsqrt()
    return y, -0.5 * dx * y / x


def _tanh(x, dx):
    y = x.tanh()
    return y, dx * (1 - y * y)


def _sigmoid(x, dx):
    y = x.sigmoid()
    return y, dx * y * (1 - y)


def _exp(x, dx):
    y = x.exp()
    return y, y * dx


_SHAPE = """reshape view flatten unflatten permute transpose movedim unsqueeze squeeze contiguous to float double half
type_as chunk split split_with_sizes unbind
expand expand_as repeat repeat_interleave index_select narrow select roll clone mean sum cat
stack neg flip"""
_RULES: dict[str, Callable] = {
    **{name: _linear_map(getattr(Tensor, name, None) or getattr(torch, name)) for name in _SHAPE.split()},
    "__getitem__": _linear_map(Tensor.__getitem__),
    "interpolate": _linear_map(F.interpolate),
    "pad": _linear_map(F.pad),
    "silu": _curve(_silu),
    "gelu": _curve(_gelu),
    "sin": _curve(lambda x, dx: (x.sin(), x.cos() * dx)),
    "cos": _curve(lambda x, dx: (x.cos(), -x.sin() * dx)),
    "square": _curve(lambda x, dx: (x.square(), 2 * x * dx)),
    "exp": _curve(_exp),
    "tanh": _curve(_tanh),
    "sigmoid": _curve(_sigmoid),
    "sqrt": _curve(_root),
    "rsqrt": _curve(_inverse_root),
    **dict.fromkeys(("add", "__add__", "__radd__", "add_"), _add),
    **dict.fromkeys(("sub", "__sub__", "subtract"), lambda a, b: _add(a, -b)),
    **dict.fromkeys(("rsub", "__rsub__"), lambda a, b: _add(b, -a)),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply"), _mul),
    **dict.fromkeys(("div", "__truediv__", "true_divide", "divide"), _div),
    **dict.fromkeys(("__rdiv__", "__rtruediv__"), lambda a, b: _div(b, a)),
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), _bilinear(torch.matmul)),
    **dict.fromkeys(("pow", "__pow__"), _pow),
    "addcmul": _addcmul,
    "einsum": _einsum,
    "linear": _linear,
    "conv2d": _conv2d,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "attention": _attention,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "dropout": _dropout,
}


def dual_jvp(fn: Callable, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """``fn(*primals)`` and its derivative along ``tangents``, as :func:`torch.func.jvp` gives them.

    Raises:
        NoRule: ``fn`` calls something that has no rule here.
    """
    global _recording
    before, _recording = _recording, torch.is_grad_enabled()
    try:
        result = fn(*map(Dual, primals, tangents))
    except (TypeError, AttributeError) as error:  # something wants a tensor that is one
        raise NoRule(f"dual numbers do not get through: {error}") from error
    finally:
        _recording = before
    if isinstance(result, Dual):
        return result.value, result.tangent
    return result, torch.zeros_like(result)
