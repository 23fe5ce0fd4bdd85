"""Residuals of the flow-map identities, as pure functions of an average velocity ``u(x, t, s)``.

With ``X(x, t, s) = x + (s - t) u(x, t, s)`` and ``v(x, t) = u(x, t, t)`` the exact map satisfies, for ``s <= w <= t``::

    Lagrangian (lsd)   dX(x,t,s)/ds = v(X(x,t,s), s)
    Eulerian   (esd)   dX(x,t,s)/dt + (grad_x X(x,t,s)) v(x,t) = 0
    semigroup  (psd)   X(X(x,t,w), w, s) = X(x,t,s)

Every function returns a tensor of the shape of ``x`` that vanishes at the exact map. ``velocity(x, t)`` is what the
identity's ``v`` is taken from: the network's own diagonal, or a frozen teacher. Nothing divides by ``t - s``. ``jvp``,
``step`` and ``network`` are those of :func:`directional_derivative`.

Source: Boffi, Albergo, Vanden-Eijnden, "How to build a consistency model: learning flow maps via self-distillation",
arXiv 2505.18825, and "Flow map matching with stochastic interpolants", arXiv 2406.07507 (teacher forms).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from genkit.interpolants import expand
from genkit.training.parts.forward_mode import Jvp, differentiate

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
Velocity = Callable[[Tensor, Tensor], Tensor]
StopGrad = Literal["none", "convex", "full"]


def flow_map(u: AverageVelocity, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """``X(x, t, s) = x + (s - t) u(x, t, s)``; ``x`` ``(B, ...)``, times ``(B,)``."""
    return x + expand(s - t, x) * u(x, t, s)


def directional_derivative(
    fn, primals: tuple, tangents: tuple, how: Jvp, step: float, network: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """``(fn(*primals), d/dh fn(*(p + h q)))`` along ``tangents`` ``q``.

    Args:
        how: see :mod:`genkit.training.parts.forward_mode`. By ``"finite_difference"`` the value is the mean of the two
            evaluations, off by ``O(step^2)``.
        step: half the distance of the two evaluations, in units of the tangent.
        network: what ``fn`` calls; ``auto`` decides once for each, and the other ways refuse one that does not allow
            them.

    Raises:
        ValueError: ``how`` is not possible for ``network``; says what to do.
    """
    exact = differentiate(fn, primals, tangents, how, network)
    if exact is not None:
        return exact
    plus = fn(*(p + step * q for p, q in zip(primals, tangents, strict=True)))
    minus = fn(*(p - step * q for p, q in zip(primals, tangents, strict=True)))
    return (plus + minus) / 2, (plus - minus) / (2 * step)


def lagrangian(
    u: AverageVelocity,
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    stopgrad: StopGrad = "convex",
    jvp: Jvp = "auto",
    step: float = 5e-3,
    network: nn.Module | None = None,
) -> Tensor:
    """``dX(x,t,s)/ds - v(X(x,t,s), s)``; ``convex`` and ``full`` freeze the second term, with its input."""
    X, dX = directional_derivative(lambda s_: flow_map(u, x, t, s_), (s,), (torch.ones_like(s),), jvp, step, network)
    if stopgrad == "none":
        return dX - velocity(X, s)
    with torch.no_grad():
        target = velocity(X.detach(), s)
    return dX - target


def eulerian(
    u: AverageVelocity,
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    stopgrad: StopGrad = "full",
    jvp: Jvp = "auto",
    step: float = 5e-3,
    network: nn.Module | None = None,
) -> Tensor:
    """``dX(x,t,s)/dt + (grad_x X) v(x,t)``; ``convex`` freezes ``v``, ``full`` the whole second term."""
    _, dX = directional_derivative(lambda t_: flow_map(u, x, t_, s), (t,), (torch.ones_like(t),), jvp, step, network)
    with torch.no_grad() if stopgrad != "none" else nullcontext():
        v = velocity(x, t)
    with torch.no_grad() if stopgrad == "full" else nullcontext():
        _, advected = directional_derivative(lambda x_: flow_map(u, x_, t, s), (x,), (v,), jvp, step, network)
    return dX + advected


def progressive(
    u: AverageVelocity, x: Tensor, t: Tensor, s: Tensor, gamma: Tensor, *, stopgrad: StopGrad = "convex"
) -> Tensor:
    """``u(x,t,s) - [(1-gamma) u(x,t,w) + gamma u(X(x,t,w),w,s)]`` with ``w = gamma t + (1-gamma) s``.

    The semigroup identity written on ``u``, whose scale does not vanish like ``(t - s)^2``. ``gamma`` has shape
    ``(B,)``; 1/2 everywhere gives PSD-M. ``convex`` and ``full`` freeze the bracket.
    """
    with torch.no_grad() if stopgrad != "none" else nullcontext():
        w = gamma * t + (1 - gamma) * s
        first = u(x, t, w)
        middle = x + expand(w - t, x) * first
        target = expand(1 - gamma, x) * first + expand(gamma, x) * u(middle, w, s)
    return u(x, t, s) - target
