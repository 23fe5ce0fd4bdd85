"""Flow maps: one network that is a flow model on its diagonal and jumps between any two times off it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser, FlowMap
from genkit.denoisers.scalars import without
from genkit.interpolants import expand
from genkit.rng import ItemRNG
from genkit.training.objectives.base import (
    Batch,
    DivergedError,
    Loss,
    Objective,
    ObjectiveConfig,
    Phase,
    Role,
    drop_condition,
)
from genkit.training.parts.loss_weight import LossWeight
from genkit.training.parts.losses import evaluating, sum_of_squares
from genkit.training.parts.residuals import Jvp, StopGrad, eulerian, lagrangian, progressive
from genkit.training.parts.targets import guided_velocity
from genkit.training.parts.times import share


class GuidanceLaw(ObjectiveConfig):
    """Guidance scales of which every item draws its own, ``w`` in ``[low, high]`` with density proportional to
    ``w^-exponent``; the student embeds them, and is told ``default`` when it samples unless asked otherwise.

    Source: iMF, arXiv 2512.02012 (the law and its numbers).
    """

    low: float = Field(1.0, gt=0)
    high: float = Field(8.0, gt=0)
    exponent: float = Field(1.0, ge=0)
    default: float = Field(2.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self):
        if not self.low <= self.default <= self.high or self.low == self.high:
            raise ValueError(f"low={self.low:g}, default={self.default:g}, high={self.high:g}: must be in this order")
        return self

    def draw(self, rng: ItemRNG) -> Tensor:
        """A scale an item, ``(B,)``, float32."""
        u, power = rng.uniform(), 1 - self.exponent
        if power == 0:
            return self.low * (self.high / self.low) ** u
        return (self.low**power + u * (self.high**power - self.low**power)) ** (1 / power)


class FlowMapConfig(ObjectiveConfig):
    """Settings of :class:`FlowMapObjective`.

    ``loss``: ``lsd``, ``esd``, ``psd_m`` or ``psd_u``. ``diagonal_fraction``: share of items trained by flow matching.
    ``stopgrad``: ``none``, ``convex`` or ``full``; unset means as published, ``full`` for ``esd`` and ``convex`` for
    the others. ``jvp``: how ``lsd`` and ``esd`` differentiate (see :mod:`genkit.training.parts.forward_mode`;
    ``jvp_step``: half the distance, in ``t``, of finite differences). ``guidance_scale``: 1 is none; otherwise the
    guidance the student is taught, from the teacher's two branches or, without teacher, its own; a
    :class:`GuidanceLaw` for one that can be told how much.
    ``learned_weight``: divide each loss by its own learned scale (see :class:`LossWeight`). Training stops when the
    off-diagonal is weighted more than ``weight_ratio_limit`` times the diagonal: self-consistency, which can be had
    without any data, would drown the data.
    """

    loss: Literal["lsd", "esd", "psd_m", "psd_u"] = "lsd"
    diagonal_fraction: float = Field(0.75, gt=0, le=1)
    stopgrad: StopGrad | None = None
    jvp: Jvp = "auto"
    jvp_step: float = Field(5e-3, gt=0, lt=0.5)
    t_min: float = Field(0.0, ge=0, lt=1)
    t_max: float = Field(1.0, gt=0, le=1)
    condition_dropout: float = Field(0.1, ge=0, le=1)
    guidance_scale: Annotated[float, Field(gt=0)] | GuidanceLaw = 1.0
    learned_weight: bool = False
    weight_ratio_limit: float = Field(10.0, gt=1)

    @model_validator(mode="after")
    def _ordered(self):
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min={self.t_min} must be below t_max={self.t_max}")
        unused = {"jvp", "jvp_step"} & self.model_fields_set if self.loss.startswith("psd") else set()
        if unused:
            raise ValueError(f"{min(unused)}={getattr(self, min(unused))!r}: loss={self.loss!r} takes no derivatives")
        return self


class FlowMapObjective(Objective):
    """Flow matching on the diagonal plus a flow-map identity off it (see :mod:`genkit.training.parts.residuals`).

    ``L = mean_i [ exp(-w_i) r_i + w_i ]`` with ``r_i`` the squared residual of item ``i`` summed over dimensions and
    ``w = 0`` unless learned. Times of the off-diagonal items are uniform on the triangle ``s <= t``. With a teacher the
    identity's velocity is the teacher's (for ``psd`` the teacher replaces the diagonal's target), else the
    student's own diagonal. Which items are on the diagonal follows from their position in the run, so that every
    batch, micro-batch and process count sees the same split.

    Source: Boffi et al., arXiv 2505.18825 (LSD, ESD, PSD, learned weight); arXiv 2406.07507 (teacher forms);
    guidance: target of iMF, arXiv 2512.02012.
    """

    Config = FlowMapConfig
    needs_flow_map = True
    needs_teacher = "optional"

    student: FlowMap

    def __init__(self, config: FlowMapConfig, student: FlowMap, teacher: Denoiser | None = None):
        super().__init__(config, student, teacher)
        self.weight = LossWeight() if config.learned_weight else None
        if isinstance(config.guidance_scale, GuidanceLaw):
            student.add_scalars({"guidance_scale": config.guidance_scale.default})

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = dict(super().roles)
        if self.weight is not None:
            roles["weight"] = Role(self.weight)
        return roles

    @property
    def uses_forward_mode(self) -> bool:
        return self.config.jvp in ("dual", "func") and self.config.loss in ("lsd", "esd")

    def phases(self, step: int):
        trains = ("student", "weight") if self.weight is not None else ("student",)
        return (Phase("student", trains=trains),)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c = self.config
        batch, scale = self._guided(batch, rng)
        condition, dropped = drop_condition(batch, rng, c.condition_dropout)
        a = c.t_min + (c.t_max - c.t_min) * rng.uniform()
        b = c.t_min + (c.t_max - c.t_min) * rng.uniform()
        gamma = rng.uniform() if c.loss == "psd_u" else torch.full_like(a, 0.5)
        off = share(batch.index, 1 - c.diagonal_fraction)
        t, s = torch.maximum(a, b).where(off, a), torch.minimum(a, b).where(off, a)
        eps = rng.normal(batch.x0.shape[1:], dtype=batch.x0.dtype)
        x = self.student.interpolant.interpolate(batch.x0, eps, t)
        target = self.student.interpolant.velocity(batch.x0, eps, t)

        on_i, off_i = (~off).nonzero()[:, 0], off.nonzero()[:, 0]
        pieces: list[tuple[Tensor, Tensor]] = []
        logs: dict[str, Tensor] = {}
        if len(on_i):
            at = (x[on_i], t[on_i], condition.index(on_i))
            goal = self._diagonal_target(*at, target[on_i], dropped[on_i], scale[on_i])
            r = sum_of_squares(self.student.average_velocity(at[0], at[1], at[1], at[2]) - goal)
            pieces.append((r, on_i))
            logs["diagonal"] = r.detach().mean()
        if len(off_i):
            with evaluating(self.student_module):  # no dropout in the identity
                jump = (x[off_i], t[off_i], s[off_i], condition.index(off_i))
                r = sum_of_squares(self._residual(*jump, gamma[off_i], scale[off_i]))
            pieces.append((r, off_i))
            logs["off_diagonal"] = r.detach().mean()
        residual = torch.cat([r for r, _ in pieces])
        order = torch.cat([i for _, i in pieces])
        if self.weight is None:
            yield Loss(residual.mean(), logs)
            return
        w = self.weight(t[order], s[order])
        self._watch_weights(w.detach(), off[order], logs)
        yield Loss((torch.exp(-w) * residual + w).mean(), logs)

    # -- targets ----------------------------------------------------------------------------------------------

    def _guided(self, batch: Batch, rng: ItemRNG) -> tuple[Batch, Tensor]:
        """The batch, told its guidance scales where the student embeds them, and these ``(B,)``."""
        law = self.config.guidance_scale
        if law != 1 and not batch.condition.values:
            raise ValueError(f"guidance_scale={law}: the network is unconditional; accepted is 1")
        if not isinstance(law, GuidanceLaw):
            return batch, torch.full((len(batch.x0),), law, device=batch.x0.device)
        w = law.draw(rng)
        told = batch.condition.with_values({"guidance_scale": w}, {"guidance_scale": torch.ones_like(w)})
        return replace(batch, condition=told), w

    def _diagonal_target(
        self, x: Tensor, t: Tensor, condition: Condition, target: Tensor, dropped: Tensor, w: Tensor
    ) -> Tensor:
        """Velocity that the diagonal regresses to: the data's, guided if asked for.

        Without teacher ``v_c + (1 - 1/w) (u(x,t,t|c) - u(x,t,t|null))``, whose fixed point is ``u_n + w (v - u_n)``.
        Items whose condition was dropped keep the plain target, so that the unconditional branch stays unguided.
        """
        plain = self.config.guidance_scale == 1
        if self.teacher is not None and (not plain or self.config.loss.startswith("psd")):
            return self._teacher_velocity(x, t, condition, w)
        if plain:
            return target
        with torch.no_grad(), evaluating(self.student_module):
            cond = self.student.average_velocity(x, t, t, condition)
            null = self.student.average_velocity(x, t, t, condition.null())
        guided = target + expand(1 - 1 / w, target) * (cond - null)
        return target.where(expand(dropped, target), guided)

    def _teacher_velocity(self, x: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        assert self.teacher is not None
        scale = 1.0 if self.config.guidance_scale == 1 else w
        return guided_velocity(self.teacher, x, t, without(condition, {"guidance_scale": 1.0}), scale)

    def _residual(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition, gamma: Tensor, w: Tensor) -> Tensor:
        c = self.config

        def u(x_: Tensor, t_: Tensor, s_: Tensor) -> Tensor:
            return self.student.average_velocity(x_, t_, s_, condition)

        def velocity(x_: Tensor, t_: Tensor) -> Tensor:
            return u(x_, t_, t_) if self.teacher is None else self._teacher_velocity(x_, t_, condition, w)

        how: dict[str, Any] = {"jvp": c.jvp, "step": c.jvp_step, "network": self.student_module}
        if c.loss == "lsd":
            kind: StopGrad = c.stopgrad or "convex"
            return lagrangian(u, velocity, x, t, s, stopgrad=kind, **how)
        if c.loss == "esd":
            kind = c.stopgrad or "full"
            return eulerian(u, velocity, x, t, s, stopgrad=kind, **how)
        return progressive(u, x, t, s, gamma, stopgrad=c.stopgrad or "convex")

    def _watch_weights(self, w: Tensor, off: Tensor, logs: dict[str, Tensor]) -> None:
        if not (off.any() and (~off).any()):
            return
        logs["weight_diagonal"] = torch.exp(-w[~off]).mean()
        logs["weight_off_diagonal"] = torch.exp(-w[off]).mean()
        ratio = (logs["weight_off_diagonal"] / logs["weight_diagonal"]).item()
        if ratio > self.config.weight_ratio_limit:
            raise DivergedError(
                f"learned_weight: the off-diagonal loss is weighted {ratio:.1f} times the diagonal one, more than "
                f"weight_ratio_limit={self.config.weight_ratio_limit:g}; the network would forget the data. Train with "
                "learned_weight=false."
            )
