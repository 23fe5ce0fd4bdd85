"""Classifier-free guidance with manifold projection: CFG-MP, and CFG-MP+ with Anderson acceleration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.denoisers.base import Condition, Prediction
from genkit.guidance.arithmetic import dot
from genkit.guidance.base import Guider, Point, check_range, within
from genkit.guidance.rule import inner_rule
from genkit.interpolants import Interpolant, Linear, expand


class CFGMP(Guider):
    """CFG-MP(+): before guiding, move the sample towards where conditional and unconditional velocities agree.

    With ``v_c``, ``v_u`` the velocities ``eps - x0`` at the current time, which stays, and ``h`` half the coming step
    on the linear path (``tau = sigma / (alpha + sigma)``, so that any path is followed through its linear image)::

        G(z):  y = z + h v_u(z),  G = y - h v_c(y)        fixed points: v_c(z + h v_u(z)) = v_u(z)
        H(z):  y = z - h v_c(z),  H = y + h v_u(y)        (where ``1 - tau <= reversed_stop``)

    ``z <- G(z)`` is iterated, with Anderson acceleration over ``anderson_window`` earlier iterates (0: CFG-MP), where
    ``projection_start <= 1 - tau <= projection_stop``; then the combination rule at the moved point. Samples stop one
    by one. Iterates are kept in float32 at least. An iteration costs two network calls, so that ``N`` steps, ``n`` of
    them corrected, cost ``2 N + 2 K n``: compare with CFG at as many calls, which :meth:`stats` counts.

    Convergence is not guaranteed: at ``t = 1`` the gap cannot be closed, and where the map hardly contracts one
    accelerated step leads far (on digits at 8 steps by twice the rms of the sample, which ruins it); ``trust_radius``,
    0.1 say, and ``damping`` are guards. ``stats()["displacement"]`` tells.

    Source: "Improving classifier-free guidance of flow matching via manifold projection", arXiv 2601.21892.

    Args:
        guidance_scale: of classifier-free guidance; without effect if ``rule`` is given.
        rule: another combination rule, as ``{"name": "apg", "guidance_scale": 8}``.
        iterations: ``K >= 0`` applications of the map at a step; 0 is the rule alone.
        anderson_window: ``m >= 0``.
        damping: ``beta`` in ``(0, 1]``, weight of ``G(z)`` against ``z`` itself.
        ridge: ``rho >= 0``; ``rho^2`` is added to the normal equations.
        relative_ridge: measure ``rho^2`` in units of the mean diagonal of the normal equations. Otherwise the ridge
            does nothing to large samples, and stalls the acceleration where residuals are tiny.
        tolerance: ``>= 0``; a sample whose mean ``|G(z) - z|`` is below moves no further.
        trust_radius: ``> 0``, the largest rms of a sample's move, in units of the network's input; ``None``: no bound.
        projection_start, projection_stop: window of the projection on the noise axis, both ends included.
        reversed_stop: up to where ``H`` replaces ``G``; the code published for SD3.5 has 0.05. 0: nowhere.
        start, stop, enabled, scheduler_config: see :class:`Guider`; the window of projection and rule together.

    :meth:`stats` has, per corrected evaluation and sample, ``applications`` of the map, ``first_residual`` and
    ``last_residual``, the mean ``|G(z) - z|`` before the first and the last move, ``displacement``, the rms of the
    whole move, and ``gap``, the rms of ``v_c - v_u`` where it ends.

    Raises:
        ValueError: a value outside its range; no end of the step to take ``h`` from; an ``epsilon`` model where
            ``alpha = 0``.
    """

    moves_sample = True

    @register_to_config
    def __init__(
        self,
        *,
        guidance_scale: float = 4.5,
        rule: dict | None = None,
        iterations: int = 2,
        anderson_window: int = 1,
        damping: float = 1.0,
        ridge: float = 1e-4,
        relative_ridge: bool = False,
        tolerance: float = 1e-6,
        trust_radius: float | None = None,
        projection_start: float = 0.0,
        projection_stop: float = 0.4,
        reversed_stop: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scheduler_config: dict | None = None,
    ):
        check_range("iterations", iterations, 0)
        check_range("anderson_window", anderson_window, 0)
        check_range("damping", damping, 0, 1, open_low=True)
        check_range("ridge", ridge, 0)
        check_range("tolerance", tolerance, 0)
        if trust_radius is not None:
            check_range("trust_radius", trust_radius, 0, open_low=True)
        check_range("projection_start", projection_start, 0, 1)
        check_range("projection_stop", projection_stop, projection_start, 1)
        check_range("reversed_stop", reversed_stop, 0, 1)
        super().__init__(start=start, stop=stop, enabled=enabled, scheduler_config=scheduler_config)
        self.hold(inner_rule(rule, guidance_scale))
        self.needs_uncond |= iterations > 0
        self.guidance_scale = guidance_scale
        self.rule = rule
        self.iterations = iterations
        self.anderson_window = anderson_window
        self.damping = damping
        self.ridge = ridge
        self.relative_ridge = relative_ridge
        self.tolerance = tolerance
        self.trust_radius = trust_radius
        self.projection_start, self.projection_stop = projection_start, projection_stop
        self.reversed_stop = reversed_stop

    @property
    def neutral(self) -> bool:
        return self.iterations == 0 and self.inner.neutral

    def guide(self, point, state):
        state = self.begun(point, state)
        if not self.active(point.t):
            return super().guide(point, state)
        tau = _linear_time(point.denoiser.interpolant, point.t)
        if not self.iterations or not within(tau, self.projection_start, self.projection_stop):
            return self.inner.guide(point, state)
        z = self._projected(point, tau)
        guided, state = self.inner.guide(replace(point, z=z), state)
        if {"cond", "uncond"} <= guided.parts.keys():
            cond, uncond = (_velocity(guided.parts[name], z) for name in ("cond", "uncond"))
            self.note(gap=_rms(cond - uncond))
        return replace(guided, z=z if guided.z is None else guided.z), state

    def _projected(self, point: Point, tau: Tensor) -> Tensor:
        """Where the iteration ends, in float32 at least."""
        path = point.denoiser.interpolant
        if point.t_next is None:
            raise ValueError("CFGMP needs the time where the step ends (point.t_next), got None")
        # An image of the linear path is (alpha + sigma) times its sample: so are steps on it.
        unit = float(path.alpha(point.t) + path.sigma(point.t))
        h = unit * float(tau - _linear_time(path, point.t_next)) / 2
        x = point.z.to(torch.promote_types(point.z.dtype, torch.float32))
        null = point.condition.null()

        def velocity(z: Tensor, rows: Tensor, condition: Condition) -> Tensor:
            z_in = point.z if z is x else z  # a prediction that has been made there is not made again
            condition = condition if len(rows) == len(x) else condition.index(rows)
            (prediction,) = point.denoiser.many(z_in, point.t, [condition], timestep=point.timestep)
            return _velocity(prediction, z)

        def uncond_first(z: Tensor, rows: Tensor) -> Tensor:
            y = torch.add(z, velocity(z, rows, null), alpha=h)
            return torch.sub(y, velocity(y, rows, point.condition), alpha=h)

        def cond_first(z: Tensor, rows: Tensor) -> Tensor:
            y = torch.sub(z, velocity(z, rows, point.condition), alpha=h)
            return torch.add(y, velocity(y, rows, null), alpha=h)

        reverse = self.reversed_stop > 0 and within(tau, 0, self.reversed_stop)
        result = fixed_point(
            cond_first if reverse else uncond_first,
            x,
            iterations=self.iterations,
            window=self.anderson_window,
            damping=self.damping,
            ridge=self.ridge,
            relative_ridge=self.relative_ridge,
            tolerance=self.tolerance,
            trust_radius=self.trust_radius,
        )
        self.note(
            applications=result.applications,
            first_residual=result.first_residual,
            last_residual=result.last_residual,
            displacement=_rms(result.z - x),
        )
        return result.z


@dataclass
class FixedPoint:
    """Where an iteration ended, and how; one number a sample but for ``z``."""

    z: Tensor
    applications: Tensor
    first_residual: Tensor
    last_residual: Tensor


def fixed_point(
    apply: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    *,
    iterations: int,
    window: int = 1,
    damping: float = 1.0,
    ridge: float = 0.0,
    relative_ridge: bool = False,
    tolerance: float = 0.0,
    trust_radius: float | None = None,
) -> FixedPoint:
    """Iterate ``z <- G(z)`` from ``x`` ``(B, ...)``, accelerated by :func:`anderson_step`, each sample for itself.

    Args:
        apply: ``G(z, rows)``, at the samples ``rows`` (int64) alone, whose iterates ``z`` are.
        iterations: the most applications of ``G``.
        window, damping, ridge, relative_ridge: see :func:`anderson_step`; ``window=0`` is Picard's iteration.
        tolerance: a sample whose mean ``|G(z) - z|`` is below stops where it is.
        trust_radius: the largest rms of ``z - x``; iterates beyond are pulled back along their way.
    """
    z, result = x, x.clone()
    rows = torch.arange(len(x), device=x.device)
    past: list[tuple[Tensor, Tensor]] = []
    applications, first, last = (torch.zeros(len(x), device=x.device, dtype=x.dtype) for _ in range(3))
    for k in range(iterations):
        f = apply(z, rows) - z
        applications[rows] += 1
        last[rows] = residual = torch.linalg.vector_norm(f.flatten(1), ord=1, dim=1) / f[0].numel()
        if k == 0:
            first = last.clone()
        going = residual >= tolerance
        if tolerance > 0 and not bool(going.all()):
            rows, z, f = rows[going], z[going], f[going]
            past = [(z_j[going], f_j[going]) for z_j, f_j in past]
        if not len(rows):
            break
        past = [*past, (z, f)][-window - 1 :]
        z = anderson_step(past, damping=damping, ridge=ridge, relative_ridge=relative_ridge)
        if trust_radius is not None:
            move = z - x[rows]
            z = x[rows] + move * expand((trust_radius / _rms(move)).clamp(max=1).to(z.dtype), z)
        result[rows] = z
    return FixedPoint(result, applications, first, last)


def anderson_step(
    past: Sequence[tuple[Tensor, Tensor]], *, damping: float = 1.0, ridge: float = 0.0, relative_ridge: bool = False
) -> Tensor:
    """The next iterate of Anderson's method (type II) for a fixed point of ``G``, a sample at a time.

    With residuals ``f_j = G(z_j) - z_j``, the last pair being ``k``, and columns ``Y = [f_k - f_j]``, ``j < k``::

        gamma = argmin |f_k - Y gamma|^2 + rho^2 |gamma|^2
        z_{k+1} = z_k + beta f_k - sum_j gamma_j [(z_k - z_j) + beta (f_k - f_j)]

    The least solution where columns depend on each other. A change of the residual no larger than rounding is none.

    Args:
        past: pairs ``(z_j, f_j)``, ``(B, ...)`` each, the last one newest; one pair alone is a (damped) Picard step.
        damping: ``beta``.
        ridge, relative_ridge: ``rho``, and whether ``rho^2`` is in units of the mean of ``|f_k - f_j|^2``.
    """
    z, f = past[-1]
    step = damping * f
    if len(past) > 1:
        columns = [f - f_j for _, f_j in past[:-1]]
        axes = tuple(range(1, f.ndim))
        pairs = [[dot(a, b, axes).flatten() for b in columns] for a in columns]
        gram = torch.stack([torch.stack(row, -1) for row in pairs], -2)
        right = torch.stack([dot(column, f, axes).flatten() for column in columns], -1)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        weight = diagonal.mean(-1) if relative_ridge else torch.ones_like(diagonal[:, 0])
        gram = gram + torch.diag_embed((ridge**2 * weight)[:, None].expand_as(diagonal))
        rounding = dot(z, z, axes).flatten() * (4 * torch.finfo(z.dtype).eps) ** 2 + 1e-15 * diagonal.sum(-1)
        # On the CPU: m x m numbers a sample, which GPUs take longer to factor than to send.
        inverse = torch.linalg.pinv(gram.cpu(), atol=rounding.cpu(), hermitian=True)
        gamma = (inverse @ right.cpu()[..., None])[..., 0].to(f)
        for j, (z_j, _) in enumerate(past[:-1]):
            step.addcmul_(expand(gamma[:, j], z), (z - z_j).add_(columns[j], alpha=damping), value=-1)
    return z + step


def _linear_time(path: Interpolant, t: Tensor) -> Tensor:
    """The time of the linear path at which the ratio of noise to signal is that of ``path`` at ``t``."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    return sigma / (alpha + sigma)


def _velocity(prediction: Prediction, z: Tensor) -> Tensor:
    """``eps - x0`` in the dtype of ``z``, which the prediction was made at."""
    path, raw = prediction.interpolant, prediction.raw.to(z.dtype)
    if isinstance(path, Linear):
        return path.convert(raw, prediction.prediction_type, "flow_prediction", z, prediction.t)
    x0, eps = path.ends(raw, prediction.prediction_type, z, prediction.t)
    return eps - x0


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1) / x[0].numel() ** 0.5
