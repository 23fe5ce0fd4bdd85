"""What a network is taught by itself in APEX and TwinFlow, as pure functions of velocities and times."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from genkit.interpolants import expand

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def enhancement(guidance_scale: float, frozen: bool) -> float:
    """``rho`` in ``target + rho (u_c - u_n)`` that teaches guidance of ``guidance_scale`` ``w`` (1 is none).

    ``w - 1`` where ``u`` is frozen; ``1 - 1/w < 1`` where it follows what is taught, since the fixed point of
    ``u_c = v + rho (u_c - u_n)`` is ``u_n + (v - u_n) / (1 - rho)``.
    """
    return guidance_scale - 1 if frozen else 1 - 1 / guidance_scale


def consistency_residual(
    u: AverageVelocity,
    average: Tensor,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    velocity: Tensor,
    *,
    delta: float,
    intervals: int,
) -> Tensor:
    """``r = ((t - s) u(x,t,s) - I) / delta - v``: how far ``u(x,t,s)`` is from a short step and then ``N`` jumps.

    From ``x - delta v`` at ``t_m = max(t - delta, s)``, ``I = sum (t_a - t_b) u(x_a, t_a, t_b)`` over ``N`` equal parts
    of ``[s, t_m]``. Where ``t < s + delta`` there is no room for jumps, and ``r = u(x,t,s) - v``. As ``delta -> 0``
    with the marginal velocity, ``r`` is the residual of MeanFlow, ``u + (t - s) du/dt - v``; with one sample's velocity
    it has that one's variance on top.

    Args:
        average: ``u(x, t, s)``, evaluated already.
        velocity: ``v`` at ``(x, t)``, shape of ``x``.
        intervals: ``N >= 1``.

    Source: arXiv 2604.12322, "RCGM" term of the released code.
    """
    middle = torch.maximum(t - delta, s)
    at, now, total = x - delta * velocity, middle, torch.zeros_like(velocity)
    for k in range(1, intervals + 1):
        then = s if k == intervals else middle + (s - middle) * (k / intervals)
        jump = expand(now - then, x) * u(at, now, then)
        at, total, now = at - jump, total + jump, then
    residual = (expand(t - s, x) * average - total) / delta - velocity
    return residual.where(expand(t - s >= delta, x), average - velocity)


def gap_weight(t: Tensor, s: Tensor) -> Tensor:
    """``tan(0.4 pi (1 - |t - s|)) + 1``: from 4.08 on the diagonal to 1 for a jump from noise to data."""
    return torch.tan(0.4 * math.pi * (1 - (t - s).abs())) + 1


def next_decay(decay: Tensor, limit: float) -> Tensor:
    """The decay of an average a step later, on its way from 0 to ``limit``."""
    return decay + 0.5 * (1 - decay) * (limit - decay)


def mixed_velocity(data: Tensor, fake: Tensor, mix: float | Tensor) -> Tensor:
    """``(1 - lambda) v_data + lambda sg v_fake``.

    On the linear path, regressing it is regressing the clean sample to ``(1 - lambda) x0 + lambda (x_t - t v_fake)``
    with the weight ``1 / t^2``. Source: arXiv 2604.12322, equations 14 to 18.
    """
    return (1 - mix) * data + mix * fake.detach()
