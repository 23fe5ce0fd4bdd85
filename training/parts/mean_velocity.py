"""Identities that average velocities and consistency models satisfy, as pure functions of the network.

The average velocity ``u`` of a flow ``dx/dt = v(x, t)`` from ``t`` to ``s <= t``, its solution ``f(x, t, s) = x +
(s - t) u(x, t, s)`` and the clean sample ``f(x, t) = f(x, t, 0)`` obey, with ``d/dt`` along the flow::

    MeanFlow   u = v - (t - s) du/dt
    SoFlow     f(x, t, s) = f(x + (l - t) v, l, s) + O((t - l)^2)        s <= l < t
    sCM        df/dt = 0

Nothing here needs the linear path. Times have shape ``(B,)``, samples ``(B, ...)``.

Source: "Mean flows for one-step generative modeling", arXiv 2505.13447; "Improved mean flows", arXiv 2512.02012;
"SoFlow: solution flow models for one-step generative modeling", arXiv 2512.15657; Lu and Song, "Simplifying,
stabilizing and scaling continuous-time consistency models", arXiv 2410.11081.
"""

import torch
from torch import Tensor, nn

from genkit.denoisers.base import Condition, Denoiser
from genkit.interpolants import Interpolant, expand
from genkit.training.parts.forward_mode import Jvp, differentiate
from genkit.training.parts.losses import wide
from genkit.training.parts.residuals import AverageVelocity, Velocity, directional_derivative


@torch.no_grad()
def total_derivative(
    fn: Velocity,
    v: Tensor,
    x: Tensor,
    t: Tensor,
    *,
    low: Tensor | float = 0.0,
    jvp: Jvp = "auto",
    step: float = 5e-3,
    network: nn.Module | None = None,
) -> Tensor:
    """``d fn/dt = (grad_x fn) v + d_t fn`` at ``(x, t)``: the derivative of ``fn(x, t)`` in direction ``(v, 1)``.

    Without graph and without autocast, so that half precision does not enter. Finite differences stay within
    ``[low, 1]``: near an end they are those of the nearest point of the line from which ``step`` fits on either side.

    Args:
        low: earliest time that may be asked for, ``(B,)`` or a number.
        jvp, step, network: see :func:`genkit.training.parts.residuals.directional_derivative`.
    """
    along = (v.to(x.dtype), torch.ones_like(t))
    with torch.autocast(x.device.type, enabled=False):
        exact = differentiate(fn, (x, t), along, jvp, network)
        if exact is not None:
            return exact[1]
        middle = torch.maximum(t, torch.as_tensor(low, dtype=t.dtype, device=t.device) + step).clamp(max=1 - step)
        point = (x + expand(middle - t, x) * along[0], middle)
        return directional_derivative(fn, point, along, "finite_difference", step)[1]


def mean_flow(
    u: AverageVelocity,
    target: Tensor,
    tangent: Tensor,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    jvp: Jvp = "auto",
    step: float = 5e-3,
    network: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """``(r, du/dt)`` with ``r = u(x,t,s) + (t - s) sg[du/dt] - target``; only the first term has a gradient.

    ``target`` stands for the velocity at ``(x, t)``, ``tangent`` for the direction in which ``du/dt`` is taken: the
    same tensor in MeanFlow, the network's own ``u(x, t, t)`` in improved MeanFlow, where ``u + (t - s) sg[du/dt]`` is
    regressed to a target that no network enters. ``du/dt`` comes from a pass of its own: ``u`` is called once more, as
    anywhere else, so that its gradient takes the ordinary way.

    Source: arXiv 2505.13447, equations 6 and 9; the network's own tangent: arXiv 2512.02012.
    """
    derivative = total_derivative(
        lambda x_, t_: u(x_, t_, s), tangent, x, t, low=s, jvp=jvp, step=step, network=network
    )
    return u(x, t, s) + expand(t - s, x) * derivative - target, derivative


def solution_consistency(
    u: AverageVelocity, v: Tensor, x: Tensor, t: Tensor, s: Tensor, middle: Tensor
) -> tuple[Tensor, Tensor]:
    """``(u(x,t,s), dq)`` with ``dq = [f(x,t,s) - f(x_l,l,s)] / (t - l)``, ``l = middle`` and ``x_l = x + (l - t) v``.

    ``dq`` has no gradient; it is formed as ``v - u_l - (t - s)/(t - l) (u - u_l)``, which does not cancel. For ``l``
    near ``t`` it is minus the residual of :func:`mean_flow`.

    Source: arXiv 2512.15657.
    """
    value = u(x, t, s)
    with torch.no_grad():
        later = u(x + expand(middle - t, x) * v, middle, s)
        ratio = expand((t - s) / (t - middle), x)
        return value, v - later - ratio * (value.detach() - later)


def guided_target(
    student: Denoiser, x: Tensor, t: Tensor, condition: Condition, v: Tensor, guidance_scale: Tensor, mix: Tensor
) -> Tensor:
    """Velocity to regress to so that the student itself learns to be guided, without gradient::

        (1 - mix) [w v + (1 - w) u(x,t,t|null)] + mix u(x,t,t|c)

    where ``w = guidance_scale``; at the student's fixed point that is ``u_n + w (v - u_n)``, for every ``mix``. Papers
    write it with ``omega = w (1 - mix)`` and ``kappa = mix`` (MeanFlow), a factor ``1 - mix`` (SoFlow), and
    ``mix = 1 - 1/w`` (improved MeanFlow, where it is ``v + (1 - 1/w) (u_c - u_n)``).

    Args:
        v: velocity of the data, ``(B, ...)``.
        guidance_scale, mix: ``(B,)``; 1 and 0 leave ``v``.
    """
    with torch.no_grad():
        cond, null = student.many(x, t, [condition, condition.null()])
    w, mix = expand(guidance_scale, x), expand(mix, x)
    return (1 - mix) * (w * v + (1 - w) * null.velocity) + mix * cond.velocity


class Angle:
    """A point of any path in TrigFlow: ``tan(theta) = sigma / (alpha sigma_data)``, ``x' = sigma_data x / scale``.

    On TrigFlow's own path ``x' = cos(theta) x0 + sin(theta) sigma_data eps``. ``rate`` is ``d theta/dt``; all ``(B,)``.
    """

    def __init__(self, path: Interpolant, t: Tensor, sigma_data: float):
        self.path, self.t, self.sigma_data = path, t, sigma_data
        alpha, sigma = path.alpha(t) * sigma_data, path.sigma(t)
        self.scale = torch.sqrt(alpha**2 + sigma**2)
        self.cos, self.sin = alpha / self.scale, sigma / self.scale
        self.rate = (alpha * path.d_sigma(t) - sigma_data * path.d_alpha(t) * sigma) / self.scale**2

    def velocity(self, value: Tensor, prediction_type: str, x: Tensor) -> Tensor:
        """``dx'/d theta = cos(theta) sigma_data eps - sin(theta) x0`` of a prediction at ``x``, of any type."""
        x0, eps = self.path.ends(wide(value), prediction_type, wide(x), self.t)
        return expand(self.cos * self.sigma_data, x) * eps - expand(self.sin, x) * x0


def consistency_tangent(
    F: Velocity,
    value: Tensor,
    angle: Angle,
    v: Tensor,
    x: Tensor,
    *,
    warmup: float = 1.0,
    jvp: Jvp = "auto",
    step: float = 5e-3,
    network: nn.Module | None = None,
) -> Tensor:
    """``g = cos(theta) df/d theta`` along the flow, with the part that is unstable early multiplied by ``warmup``::

        g = -cos^2 (F - dx'/d theta) - warmup cos sin (x' + dF/d theta)

    Zero at the solution for ``warmup = 1``. Any path and prediction type: a student is a TrigFlow model up to an exact
    change of coordinates, and ``dF/d theta = (dF/dt) / (d theta/dt)``.

    Args:
        F: ``F(x, t)``, the student's :meth:`Angle.velocity` (``sigma_data F`` in the paper), whose clean sample
            ``f = cos x' - sin F`` is read as the end of the flow.
        value: ``F(x, t)`` itself.
        angle: of the times of ``x``.
        v: velocity ``dx_t/dt`` on the student's path: of the data, or of a teacher.

    Source: arXiv 2410.11081, section 4.1 (tangent warm-up).
    """
    derivative = total_derivative(F, v, x, angle.t, jvp=jvp, step=step, network=network) / expand(angle.rate, x)
    with torch.no_grad():
        drift = value - angle.velocity(v, "flow_prediction", x)
        here = expand(angle.sigma_data / angle.scale, x) * x
        cos, sin = expand(angle.cos, x), expand(angle.sin, x)
        return -(cos**2) * drift - warmup * cos * sin * (here + derivative)
