"""What objectives of average velocities have in common: pairs of times, two kinds of items, targets, the weight."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser, FlowMap
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase
from genkit.training.parts.forward_mode import Jvp
from genkit.training.parts.losses import adaptive, evaluating, sum_of_squares
from genkit.training.parts.mean_velocity import guided_target, mean_flow
from genkit.training.parts.targets import guided_velocity
from genkit.training.parts.times import LogitNormal, TimeLaw, share


class AverageVelocityConfig(ObjectiveConfig):
    """What MeanFlow and improved MeanFlow have in common.

    ``time``, ``end_time``: laws of two times; ``end_time`` unset means as ``time``. ``order``: ``v0`` makes the later
    one ``t`` and the earlier ``s``; ``v1``, for two laws that differ, keeps ``t`` and takes ``s = min(t, end_time)``.
    ``diagonal_fraction``: share of items with ``s = t``, which are plain flow matching (``v0`` decides after ordering,
    ``v1`` before). ``jvp``: how ``du/dt`` is found (see :mod:`genkit.training.parts.forward_mode`); ``jvp_step``: half
    the distance, in ``t``, of finite differences. ``weight_power`` and
    ``weight_offset``: ``p`` and ``c`` of the weight ``1 / (r + c)^p`` of an item whose squared error, summed over
    dimensions, is ``r``.
    """

    time: TimeLaw = LogitNormal(mean=-0.4, std=1.0)
    end_time: TimeLaw | None = None
    order: Literal["v0", "v1"] = "v0"
    diagonal_fraction: float = Field(0.75, ge=0, le=1)
    jvp: Jvp = "auto"
    jvp_step: float = Field(5e-3, gt=0, lt=0.5)
    weight_power: float = Field(1.0, ge=0)
    weight_offset: float = Field(1e-3, gt=0)
    condition_dropout: float = Field(0.1, ge=0, le=1)


class AverageVelocity(Objective):
    """What MeanFlow and improved MeanFlow have in common: pairs of times, two kinds of items, the weight."""

    needs_flow_map = True
    needs_teacher = "optional"

    student: FlowMap

    @property
    def uses_forward_mode(self) -> bool:
        return self.config.jvp in ("dual", "func")

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c = self.config
        t, s = self._times(batch.index, rng)
        eps = rng.normal(batch.x0.shape[1:], dtype=batch.x0.dtype)
        x = self.student.interpolant.interpolate(batch.x0, eps, t)
        v = self.student.interpolant.velocity(batch.x0, eps, t)
        condition, target = self._target(batch, rng, x, t, s, v)

        def u(x_: Tensor, t_: Tensor, s_: Tensor, items: Tensor) -> Tensor:
            return self.student.average_velocity(x_, t_, s_, condition.index(items))

        pieces, logs = [], {}
        # On the diagonal du/dt has the factor 0, so those items do without it.
        on, off = (t == s).nonzero()[:, 0], (t > s).nonzero()[:, 0]
        if len(on):
            pieces.append(sum_of_squares(u(x[on], t[on], t[on], on) - target[on]))
            logs["diagonal"] = pieces[-1].detach().mean()
        if len(off):
            with evaluating(self.student_module):  # no dropout in the identity
                residual, derivative = mean_flow(
                    lambda x_, t_, s_: u(x_, t_, s_, off),
                    target[off],
                    self._tangent(x[off], t[off], condition.index(off), target[off]),
                    x[off],
                    t[off],
                    s[off],
                    jvp=c.jvp,
                    step=c.jvp_step,
                    network=self.student_module,
                )
            pieces.append(sum_of_squares(residual))
            logs["off_diagonal"] = pieces[-1].detach().mean()
            logs["derivative"] = sum_of_squares(derivative).mean().sqrt()
        yield Loss(adaptive(torch.cat(pieces), c.weight_power, c.weight_offset).mean(), logs)

    def _times(self, index: Tensor, rng: ItemRNG) -> tuple[Tensor, Tensor]:
        """``(t, s)`` with ``s <= t``."""
        c = self.config
        on = share(index, c.diagonal_fraction)
        a, b = c.time.draw(rng), (c.end_time or c.time).draw(rng)
        if c.order == "v1":
            return a, torch.minimum(a, b.where(~on, a))
        t = torch.maximum(a, b)
        return t, torch.minimum(a, b).where(~on, t)

    @abstractmethod
    def _target(
        self, batch: Batch, rng: ItemRNG, x: Tensor, t: Tensor, s: Tensor, v: Tensor
    ) -> tuple[Condition, Tensor]:
        """The condition that the student sees, and the velocity that it regresses to."""

    def _tangent(self, x: Tensor, t: Tensor, condition: Condition, target: Tensor) -> Tensor:
        """The direction in which ``du/dt`` is taken."""
        return target


def check_mix(guidance_mix: float, teacher: Denoiser | None) -> None:
    """Refuse a share of the student's own velocity where the target is a teacher's."""
    if teacher is not None and guidance_mix:
        raise ValueError(
            f"guidance_mix={guidance_mix:g} is for targets from data; with a teacher, whose own branches are guided, "
            "it must be 0"
        )


def guided(
    objective: Objective,
    x: Tensor,
    t: Tensor,
    condition: Condition,
    v: Tensor,
    guidance_scale: float | Tensor,
    mix: float | Tensor,
    plain: Tensor,
) -> Tensor:
    """The velocity to regress to at guidance ``guidance_scale``: the teacher's where there is one, else made of ``v``.

    Items under ``plain`` ``(B,)`` get it unguided and unmixed. Costs a call of the teacher, or two where it is guided,
    and two of the student where guidance or ``mix`` is asked for.
    """
    neutral = not isinstance(guidance_scale, Tensor) and guidance_scale == 1
    own = isinstance(mix, Tensor) or mix != 0
    if not condition.values and (own or not neutral):
        raise ValueError(
            f"guidance_scale={guidance_scale}, guidance_mix={mix}: the model is unconditional, so there is nothing to "
            "guide by; set guidance_scale=1 and guidance_mix=0"
        )
    if objective.teacher is not None:
        scale: float | Tensor = 1.0 if neutral else torch.as_tensor(guidance_scale).to(t).expand_as(t).where(~plain, 1)
        return guided_velocity(objective.teacher, x, t, condition, scale)
    if neutral and not own:
        return v
    scale, share_of_own = (torch.as_tensor(w).to(t).expand_as(t) for w in (guidance_scale, mix))
    with evaluating(objective.student_module):
        return guided_target(
            objective.student, x, t, condition, v, scale.where(~plain, 1), share_of_own.where(~plain, 0)
        )
