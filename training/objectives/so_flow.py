"""SoFlow: learn the solution of the flow from its consistency over short stretches, without derivatives."""

from collections.abc import Iterator

import torch
from pydantic import Field, model_validator
from torch import Tensor

from genkit.denoisers.base import Denoiser, FlowMap
from genkit.interpolants import expand
from genkit.rng import ItemRNG
from genkit.training.objectives._average_velocity import check_mix, guided
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, drop_condition
from genkit.training.parts.losses import adaptive, evaluating, mean_of_squares
from genkit.training.parts.mean_velocity import solution_consistency
from genkit.training.parts.times import LogitNormal, TimeLaw, share

GAP = 1e-4  # least distance of two times that must differ


class SoFlowConfig(ObjectiveConfig):
    """Settings of :class:`SoFlow`.

    ``diagonal_fraction``: share of items trained by flow matching, at times of law ``diagonal_time``; the others have
    the laws ``time`` and ``end_time``, an end past its start being moved right before it. ``rho_start``, ``rho_end``:
    ``l = t + rho (s - t)`` with ``rho`` going from one to the other geometrically over the run. ``weight_power`` and
    ``weight_offset``: ``p`` and ``c`` of the weight ``1 / (r + c)^p`` of an item whose squared error, its mean over
    dimensions, is ``r``. ``guidance_scale``: guidance that is trained into the student, 1 for none, fading out between
    ``guidance_fade`` and 1. ``guidance_mix``: how much of the student's own velocity its target holds (0.75 where the
    paper's mix is 0.25).
    """

    diagonal_fraction: float = Field(0.75, ge=0, lt=1)
    diagonal_time: TimeLaw = LogitNormal(mean=-0.2, std=1.0)
    time: TimeLaw = LogitNormal(mean=0.2, std=0.8)
    end_time: TimeLaw = LogitNormal(mean=-1.0, std=0.8)
    rho_start: float = Field(0.1, gt=0, le=1)
    rho_end: float = Field(0.002, gt=0, le=1)
    weight_power: float = Field(1.0, ge=0)
    weight_offset: float = Field(0.01, gt=0)
    guidance_scale: float = Field(1.0, ge=0)
    guidance_mix: float = Field(0.0, ge=0, lt=1)
    guidance_fade: float = Field(0.8, ge=0, le=1)
    condition_dropout: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _effective(self):
        if self.guidance_scale == 1 and "guidance_fade" in self.model_fields_set:
            raise ValueError(f"guidance_fade={self.guidance_fade:g} has no effect with guidance_scale=1")
        return self


class SoFlow(Objective):
    """Flow matching on the diagonal plus consistency of the solution ``f(x,t,s) = x + (s - t) u(x,t,s)`` off it::

        dq = [f(x_t,t,s) - f(x_l,l,s)] / (t - l)      x_l = x_t + (l - t) v      gradient of u: -sg(w dq) / D

    with ``w = 1 / (mean dq^2 + c)^p``: that of half the regression of ``u`` to ``sg(u + w dq)``, as published. The
    number reported as loss is ``w mean dq^2``, which the gradient makes smaller but is not the gradient of; logged are
    the mean squares before weighting. No derivative is taken, so any attention kernel and a quantised network will do.

    ``v`` is the velocity of the data ``alpha' x0 + sigma' eps``, mixed with the student's own for guidance (see
    :func:`genkit.training.parts.mean_velocity.guided_target`), or the guided velocity of a teacher. Any path and
    prediction type.

    Raises:
        ValueError: ``guidance_mix`` with a teacher, which is guided itself.

    Source: "SoFlow: solution flow models for one-step generative modeling", arXiv 2512.15657.
    """

    Config = SoFlowConfig
    needs_flow_map = True
    needs_teacher = "optional"

    student: FlowMap

    def __init__(self, config: SoFlowConfig, student: FlowMap, teacher: Denoiser | None = None):
        super().__init__(config, student, teacher)
        check_mix(config.guidance_mix, teacher)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c = self.config
        condition, dropped = drop_condition(batch, rng, c.condition_dropout)
        t, s = self._times(batch.index, rng)
        eps = rng.normal(batch.x0.shape[1:], dtype=batch.x0.dtype)
        x = self.student.interpolant.interpolate(batch.x0, eps, t)
        v = self.student.interpolant.velocity(batch.x0, eps, t)
        scale = 1.0 if c.guidance_scale == 1 else 1 + fading(t, c.guidance_fade) * (c.guidance_scale - 1)
        v = guided(self, x, t, condition, v, scale, c.guidance_mix, dropped)

        pieces, logs = [], {}
        on, off = (t == s).nonzero()[:, 0], (t > s).nonzero()[:, 0]
        if len(on):
            u = self.student.average_velocity(x[on], t[on], t[on], condition.index(on))
            r = mean_of_squares(u - v[on])
            pieces.append(adaptive(r, c.weight_power, c.weight_offset))
            logs["diagonal"] = r.detach().mean()
        if len(off):
            at, t_, s_ = condition.index(off), t[off], s[off]
            rho = c.rho_start * (c.rho_end / c.rho_start) ** batch.progress
            middle = torch.minimum(t_ + rho * (s_ - t_), t_ - GAP)
            with evaluating(self.student_module):  # no dropout between two times
                u, dq = solution_consistency(
                    lambda x, t, s: self.student.average_velocity(x, t, s, at), v[off], x[off], t_, s_, middle
                )
            r = mean_of_squares(dq)
            weighted = adaptive(r, c.weight_power, c.weight_offset)
            push = -(u * expand(weighted / r.clamp(min=1e-30), u) * dq).flatten(1).mean(1)
            pieces.append(weighted + push - push.detach())
            logs["consistency"] = r.mean()
            logs["rho"] = r.new_tensor(rho)
        yield Loss(torch.cat(pieces).mean(), logs)

    def _times(self, index: Tensor, rng: ItemRNG) -> tuple[Tensor, Tensor]:
        """``(t, s)``, equal on the diagonal and at least :data:`GAP` apart off it."""
        c = self.config
        on = share(index, c.diagonal_fraction)
        alone, t, s = c.diagonal_time.draw(rng), c.time.draw(rng).clamp(min=GAP), c.end_time.draw(rng)
        s = torch.minimum(s, t - GAP)
        return alone.where(on, t), alone.where(on, s)


def fading(t: Tensor, start: float) -> Tensor:
    """1 up to ``start``, then ``1 - exp(-0.025 z / (1 - z))``, ``z = (1 - t) / (1 - start)``: smoothly to 0 at 1."""
    if start == 1:
        return torch.ones_like(t)
    z = ((1 - t) / (1 - start)).clamp(0, 1)
    late = -torch.expm1(-0.025 * z / (1 - z).clamp(min=torch.finfo(t.dtype).tiny))
    return late.where(t > start, 1)
