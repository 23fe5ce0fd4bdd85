"""What a flow is like as a curve: how straight, how far it carries, whether its noise stays the same on the way."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser
from genkit.interpolants import Linear
from genkit.sampling import trajectory


@dataclass(frozen=True)
class Straightness:
    """``total`` is ``S``; ``relative`` is ``S / E|eps - x0|^2``; ``curvature`` the integrand a step, ``(steps,)``, from
    noise to data; ``transport_cost`` is ``E|eps - x0|^2`` and ``x0`` the flow's endpoints ``(B, ...)``."""

    total: float
    relative: float
    curvature: Tensor
    transport_cost: float
    x0: Tensor


@torch.no_grad()
def straightness(
    denoiser: Denoiser, eps: Tensor, condition: Condition | None = None, *, num_steps: int = 32
) -> Straightness:
    """``S = int_0^1 E |(eps - x0) - v(x_t, t)|^2 dt`` along the flow from ``eps`` to its endpoint ``x0``.

    By the midpoint rule, two evaluations a step; sums over dimensions, means over samples, in float64. 0 if and only if
    one Euler step is exact. Euler's rule in its place is off by several percent at 32 steps, in either direction.

    Args:
        denoiser: on the linear path; put another there with :class:`genkit.denoisers.on_path.OnPath`.
        eps: ``(B, ...)``, where the flow starts.

    Raises:
        ValueError: another path, or no step.

    Source: Liu et al., "Flow straight and fast", arXiv 2209.03003, equation 4.
    """
    require_linear(denoiser)
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: must be at least 1")
    h, x, velocities = 1 / num_steps, eps, []
    for k in range(num_steps):
        t = torch.full((len(eps),), 1 - k * h, dtype=torch.promote_types(eps.dtype, torch.float32), device=eps.device)
        middle = x - h / 2 * denoiser(x, t, condition).velocity
        velocities.append(denoiser(middle, t - h / 2, condition).velocity)
        x = x - h * velocities[-1]
    straight = eps.double() - x.double()
    curvature = torch.stack([_squares(straight - v.double()).mean() for v in velocities])
    cost = transport_cost(x, eps)
    total = curvature.mean().item()
    return Straightness(total, total / cost, curvature, cost, x)


def require_linear(denoiser: Denoiser) -> None:
    """Raise ``ValueError`` unless the denoiser is on the linear path."""
    if not isinstance(denoiser.interpolant, Linear):
        raise ValueError(
            f"the denoiser is on the path {type(denoiser.interpolant).__name__}; straightness is that of the linear "
            "path: wrap it in genkit.denoisers.on_path.OnPath"
        )


def transport_cost(x0: Tensor, eps: Tensor) -> float:
    """``E |eps - x0|^2`` of coupled ends ``(B, ...)``: summed over dimensions, float64."""
    return _squares(eps.double() - x0.double()).mean().item()


def first_orderness(
    denoiser: Denoiser, scheduler: Any, x: Tensor, condition: Condition | None = None, **settings: Any
) -> float:
    """``F1``: mean over the later evaluations of ``E |eps_hat(x_t, t) - eps_hat(x_1, t_1)|^2``, along sampled curves.

    0 where every step, however long, lands on the same endpoint, whether or not the path is straight.

    Args:
        denoiser, scheduler, x, condition, settings: as for :func:`genkit.sampling.trajectory`; any path.

    Raises:
        ValueError: fewer than two evaluations.

    Source: Wang et al., "Rectified diffusion: straightness is not your need in rectified flow", arXiv 2410.07303,
    section 3.2 (the first-order property).
    """
    if len(scheduler.timesteps) < 2:
        raise ValueError("the scheduler makes one step, and the first noise can only be compared with later ones")
    first, changes = None, []
    for state in trajectory(denoiser, scheduler, x, condition, **settings):
        epsilon = state.guided.prediction.epsilon.double()
        if first is None:
            first = epsilon
        else:
            changes.append(_squares(epsilon - first).mean())
    return torch.stack(changes).mean().item()


def _squares(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)
