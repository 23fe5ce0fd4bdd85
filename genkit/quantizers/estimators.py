"""Gradients through what has none: a code in place of a vector, an integer in place of a number."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from genkit.registry import unknown

VectorEstimator = Literal["ste", "rotation"]
RoundEstimator = Literal["ste", "dgm"]
SignEstimator = Literal["ste", "reste"]


def through(z: Tensor, q: Tensor, estimator: VectorEstimator = "ste") -> Tensor:
    """``q`` ``(N, D)`` in value, with a gradient to ``z``; what ``q`` itself depends on gets none.

    ``ste``, the straight-through estimator: the gradient of ``z``. ``rotation``: with ``u = z / |z|``, ``v = q / |q|``
    and ``w = (u + v) / |u + v|``, all without gradient, the value is ``(|q| / |z|) R z`` for the rotation
    ``R = I - 2 w w^T + 2 v u^T`` that takes ``u`` to ``v``, so that a gradient ``g`` comes back as
    ``(|q| / |z|) R^T g``, as long by the ratio and at the same angle to ``z`` as it was to ``q``. Opposite or vanishing
    vectors, for which there is no such, fall back to ``ste``.

    Sources: Bengio et al., "Estimating or propagating gradients through stochastic neurons", arXiv 1308.3432; Fifty et
    al., "Restructuring vector quantization with the rotation trick", arXiv 2410.06424, section 4.
    """
    if estimator not in get_args(VectorEstimator):
        raise ValueError(unknown("estimator", estimator, get_args(VectorEstimator)))
    q = q.detach()
    if estimator == "ste":
        return z + (q - z).detach()
    with torch.no_grad():
        length, wanted = z.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
        u, v = z / length.clamp(min=1e-12), q / wanted.clamp(min=1e-12)
        middle = u + v
        turnable = (length > 1e-6) & (wanted > 1e-6) & (middle.norm(dim=1, keepdim=True) > 1e-3)
        w = middle / middle.norm(dim=1, keepdim=True).clamp(min=1e-12)
        ratio = wanted / length.clamp(min=1e-12)
    turned = z - 2 * w * (w * z).sum(1, keepdim=True) + 2 * v * (u * z).sum(1, keepdim=True)
    return torch.where(turnable, ratio * turned, z + (q - z).detach())


def rounded(x: Tensor, estimator: RoundEstimator = "ste", *, sharpness: float = 1.0) -> Tensor:
    """``round(x)``, half to even, with a gradient.

    ``ste``: that of ``x``. ``dgm``, the distance-aware one: with ``f = x - floor(x)`` that of the staircase
    ``tanh(b (f - 1/2)) / (2 tanh(b / 2))``, which is ``b sech^2(b (f - 1/2)) / (2 tanh(b / 2))``: largest between two
    integers, smallest at them, 1 in the mean, ``ste`` for small ``b = sharpness``.

    Source: "DynaQuant: dynamic mixed-precision quantization for learned image compression", arXiv 2511.07903.
    """
    if estimator not in get_args(RoundEstimator):
        raise ValueError(unknown("estimator", estimator, get_args(RoundEstimator)))
    if estimator != "dgm":
        return x + (x.round() - x).detach()
    if not sharpness > 0:
        raise ValueError(f"sharpness={sharpness}: expected above 0")
    f = x - x.detach().floor()
    smooth = torch.tanh(sharpness * (f - 0.5)) / (2 * math.tanh(sharpness / 2))
    return smooth + (x.round() - smooth).detach()


class _ReSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, power: float, inner: float, outer: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shape = power, inner, outer
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (x,), (power, inner, outer) = ctx.saved_tensors, ctx.shape
        size = x.abs()
        slope = size.clamp(min=inner) ** ((1 - power) / power) / power
        slope = torch.where(size <= inner, inner ** (1 / power) / inner, slope)
        return grads[0] * torch.where(size > outer, 0.0, slope), None, None, None


def signs(x: Tensor, estimator: SignEstimator = "ste", *, power: float = 1.0) -> Tensor:
    """``sign(x)``, +1 at 0, with a gradient.

    ``ste``: that of ``x``. ``reste``: that of ``sign(x) |x|^(1 / o)``, ``o = power``, which nears the sign as ``o``
    grows: ``|x|^((1 - o) / o) / o`` for ``0.1 < |x| <= 1.5``, ``0.1^(1 / o) / 0.1`` within and 0 beyond.

    Source: Wu et al., "Estimator meets equilibrium perspective: a rectified straight through estimator for binary
    neural networks training", arXiv 2308.06689, section 3.
    """
    if estimator not in get_args(SignEstimator):
        raise ValueError(unknown("estimator", estimator, get_args(SignEstimator)))
    if estimator == "ste":
        hard = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
        return x + (hard - x).detach()
    if power < 1:
        raise ValueError(f"power={power}: expected at least 1")
    return _ReSTE.apply(x, power, 0.1, 1.5)


def reste_power(progress: float, end: float = 3.0) -> float:
    """``o`` at ``progress`` ``r`` of training: ``1 + (1 - cos(pi r / 2)) (end - 1)``."""
    return 1 + (1 - math.cos(math.pi * progress / 2)) * (end - 1)
