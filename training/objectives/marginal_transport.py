"""Marginal-data transport (MDT-dist): a student of one time input whose velocity leads straight to clean data."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from genkit.denoisers.base import Denoiser
from genkit.denoisers.on_path import OnPath, change_path
from genkit.interpolants import Linear, expand
from genkit.rng import ItemRNG
from genkit.schedulers.renoise import RenoiseScheduler
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, drop_condition
from genkit.training.parts.forward_mode import Exact, Jvp
from genkit.training.parts.losses import evaluating, mean_of_squares, wide
from genkit.training.parts.residuals import directional_derivative
from genkit.training.parts.targets import guided_velocity
from genkit.training.parts.times import LogitNormal, TimeLaw

Velocity = Callable[[Tensor, Tensor], Tensor]
_EXACT = get_args(Exact)
_Scale = Annotated[float, Field(ge=0)]
_Scales = Annotated[list[_Scale], Field(min_length=1)]


class DerivativeNorm(BaseModel):
    """``d <- d / (|d| + constant)``, the norm over all dimensions of an item.

    ``relative``: ``d / (|d| / sqrt(D) + constant)``, so that its effect does not grow with the number of dimensions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    constant: float = Field(0.1, gt=0)
    relative: bool = False

    def __call__(self, d: Tensor) -> Tensor:
        norm = wide(d).flatten(1).norm(dim=1)
        if self.relative:
            norm = norm / d[0].numel() ** 0.5
        return d / expand(norm + self.constant, d)


class MarginalTransportConfig(ObjectiveConfig):
    """Settings of :class:`MarginalTransport`; all times are of the linear path.

    ``times``: law of ``t``, stretched over the times at which the derivative can be taken. ``jvp``: how ``dv/dt`` is:
    ``backward_difference`` of ``jvp_step``, as published, by one more call; the others as in
    :mod:`genkit.training.parts.forward_mode`. ``derivative_norm``: bounds it, which is steadier but moves the fixed
    point towards the instantaneous velocity: better at 2 to 4 steps, worse at one. ``vd_weight``: of velocity
    distillation beside velocity matching; it needs a teacher. ``vm_guidance_scale``, ``vd_guidance_scale``: the
    teacher's guidance in the two (1 is none); of several each item draws one. ``consistency_phases``: in place of
    velocity matching, consistency of where the student lands at the next of so many equal stretches of time.
    ``eta``: of the sampler that the student is exported with: 1 jumps to clean data and adds fresh noise, 0 takes
    Euler steps.
    """

    times: TimeLaw = LogitNormal(mean=1.0)
    jvp: Jvp | Literal["backward_difference"] = "backward_difference"
    jvp_step: float = Field(0.01, gt=0, lt=0.5)
    derivative_norm: DerivativeNorm | None = None
    vd_weight: float = Field(1.0, ge=0)
    vm_guidance_scale: _Scale | _Scales = 1.0
    vd_guidance_scale: _Scale | _Scales = 1.0
    consistency_phases: int | None = Field(None, ge=1)
    condition_dropout: float = Field(0.0, ge=0, le=1)
    eta: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self):
        phases = self.consistency_phases
        if self.jvp in _EXACT and "jvp_step" in self.model_fields_set:
            raise ValueError(f"jvp_step={self.jvp_step} has no effect with jvp={self.jvp!r}")
        if self.vd_guidance_scale != 1 and not self.vd_weight:
            raise ValueError(f"vd_guidance_scale={self.vd_guidance_scale} has no effect with vd_weight=0")
        if phases is not None and self.jvp != "backward_difference":
            raise ValueError(f"consistency_phases={phases} is a difference of two times, not jvp={self.jvp!r}")
        if phases is not None and not self.vd_weight and self.derivative_norm is not None:
            raise ValueError(f"derivative_norm has no effect with consistency_phases={phases} and vd_weight=0")
        if (phases or 1) > 1 and self.vd_weight:
            raise ValueError(
                f"consistency_phases={phases}: velocity distillation draws in one step; set vd_weight=0 or phases to 1"
            )
        if (phases or 1) > 1 and self.eta:
            raise ValueError(
                f"eta={self.eta}: with consistency_phases={phases} the student lands at the end of a phase, not on "
                "clean data; accepted is 0"
            )
        return self


class MarginalTransport(Objective):
    """``L = VM + vd_weight VD``, means over dimensions, for ``v`` with ``x0 = x - t v(x, t)``.

    Velocity matching, on the path ``x_t = (1 - t) x0 + t eps`` and along the flow ``v_T`` of the teacher, or of the
    data (``eps - x0``) without one::

        VM = |v(x_t, t) - sg[v*]|^2         v* = v_T - t (d_t v + (grad_x v) v_T)

    which vanishes where ``v`` is the average velocity from ``t`` to 0. Velocity distillation, at the student's own
    sample ``x_f = z - v(z, 1)`` noised to ``t``, moves it by the difference of the velocity that the student implies
    there and the teacher's; the student stands in for the network of its own samples that other methods train::

        VD = |sg[v(x_ft, t) - v*(x_ft, t)] + v(z, 1) - sg[v(z, 1)]|^2

    Any prediction type and path: both networks are read on the linear path, ``x / (alpha + sigma)`` at
    ``sigma / (alpha + sigma)``, which carries the same flow.

    Raises:
        ValueError: without teacher, guidance or ``vd_weight``; a student that says nothing of clean data at ``t = 1``.

    Source: "Few-step flow for 3D generation via marginal-data transport distillation", arXiv 2509.04406.
    """

    Config = MarginalTransportConfig
    needs_teacher = "optional"

    def __init__(self, config: MarginalTransportConfig, student: Denoiser, teacher: Denoiser | None = None):
        super().__init__(config, student, teacher)
        if teacher is None and config.vd_weight:
            raise ValueError(f"vd_weight={config.vd_weight}: velocity distillation needs a teacher; set one, or 0")
        if teacher is None and config.vm_guidance_scale != 1:
            raise ValueError(f"vm_guidance_scale={config.vm_guidance_scale} needs a teacher; accepted without is 1")
        end = torch.ones((), dtype=torch.float64)
        if student.prediction_type == "epsilon" and student.interpolant.alpha(end) == 0:
            raise ValueError(
                "the student predicts epsilon on a path with alpha(1) = 0, which says nothing of clean data at t = 1; "
                "accepted there are sample, v_prediction and flow_prediction"
            )
        self.flow = _on_linear_path(student)
        self.taught = None if teacher is None else _on_linear_path(teacher)

    @property
    def uses_forward_mode(self) -> bool:
        return self.config.jvp in _EXACT

    def scheduler(self, scheduler: Any) -> RenoiseScheduler:
        # The phases are equal stretches of time, so steps must be, too.
        own = {"shift": 1.0, "timestep_spacing": "uniform"} if self.config.consistency_phases else {}
        return RenoiseScheduler.from_scheduler(scheduler, eta=self.config.eta, **own)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c, shape, dtype = self.config, batch.x0.shape[1:], batch.x0.dtype
        condition, _ = drop_condition(batch, rng, c.condition_dropout)
        first, last = self._usable()
        t = first + (last - first) * c.times.draw(rng)
        eps = rng.normal(shape, dtype=dtype)
        z = rng.normal(shape, dtype=dtype)
        linear = Linear()

        def v(x: Tensor, t: Tensor) -> Tensor:
            return self.flow(x, t, condition).velocity

        def taught(x: Tensor, scale: float | list[float]) -> Tensor:
            if self.taught is None:
                return eps - batch.x0
            return guided_velocity(self.taught, x, t, condition, _chosen(scale, rng))

        with evaluating(self.student_module):  # the derivative is of one function, so no dropout
            x = linear.interpolate(batch.x0, eps, t)
            v_taught = taught(x, c.vm_guidance_scale)
            here = v(x, t)
            if c.consistency_phases is None:
                r = here - self._target(v, v_taught, x, t, here.detach())
            else:
                r = self._landing(v, v_taught, x, t, here)
            matching = mean_of_squares(r).mean()
            logs = {"velocity_matching": matching.detach()}
            if not c.vd_weight:
                yield Loss(matching, logs)
                return
            start, end = change_path(z, torch.ones_like(t), self.student.interpolant, linear)
            end = end.to(t.dtype)
            v_one = v(start, end)
            x = linear.interpolate((start - expand(end, z) * v_one).detach(), eps, t)
            v_taught = taught(x, c.vd_guidance_scale)
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # as the difference inside it
                there = v(x, t)
                gap = there - self._target(v, v_taught, x, t, there)
            distillation = mean_of_squares(gap + v_one - v_one.detach()).mean()
        logs["velocity_distillation"] = distillation.detach()
        yield Loss(matching + c.vd_weight * distillation, logs)

    @torch.no_grad()
    def _target(self, v: Velocity, v_taught: Tensor, x: Tensor, t: Tensor, here: Tensor) -> Tensor:
        """``v* = v_T - t dv/dt``; ``here`` is ``v(x, t)``."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):  # half precision is coarser than such small differences
            if c.jvp == "backward_difference":
                here = here if here.dtype == wide(here).dtype else v(x, t)
                d = (here - v(x - c.jvp_step * v_taught, t - c.jvp_step)) / c.jvp_step
            else:
                along = (v_taught, torch.ones_like(t))
                _, d = directional_derivative(v, (x, t), along, c.jvp, c.jvp_step, self.student_module)
        if c.derivative_norm is not None:
            d = c.derivative_norm(d)
        return v_taught - expand(t, x) * d

    def _landing(self, v: Velocity, v_taught: Tensor, x: Tensor, t: Tensor, here: Tensor) -> Tensor:
        """How far apart the phase's end is as seen from ``t`` and, a step of the teacher later, from ``t - h``.

        Divided so that the gradient by ``v(x, t)`` has the size of velocity matching's. The last step within a phase is
        cut at its end: beyond, the student means the next phase.
        """
        c = self.config
        k = torch.arange(c.consistency_phases + 1, device=t.device)  # type: ignore[operator]
        bounds = self._linear_time(k / c.consistency_phases).to(t.dtype)
        end = bounds[torch.searchsorted(bounds, t) - 1]
        before = torch.maximum(t - c.jvp_step, end)
        with torch.no_grad():
            moved = x - expand(t - before, x) * v_taught
            goal = moved - expand(before - end, x) * v(moved, before)
        return (x - expand(t - end, x) * here - goal) / expand(((t - before) * (t - end)).sqrt(), x)

    def _linear_time(self, t: Tensor) -> Tensor:
        """Time on the linear path, float64, of ``t`` on the student's."""
        path = self.student.interpolant
        return Linear().time_at(path.alpha(t), path.sigma(t))

    def _usable(self) -> tuple[float, float]:
        """The times, on the linear path, between which the derivative can be taken."""
        c, last = self.config, self._linear_time(torch.ones((), dtype=torch.float64)).item()
        before = 0.0 if c.jvp in _EXACT else c.jvp_step
        return before, last - c.jvp_step if c.jvp in ("auto", "finite_difference") else last


def _on_linear_path(denoiser: Denoiser) -> Denoiser:
    return denoiser if isinstance(denoiser.interpolant, Linear) else OnPath(denoiser, Linear())


def _chosen(scale: float | list[float], rng: ItemRNG) -> float | Tensor:
    if not isinstance(scale, list):
        return scale
    chosen = rng.integers(len(scale))
    return torch.tensor(scale, device=chosen.device)[chosen]
