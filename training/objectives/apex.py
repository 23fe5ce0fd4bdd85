"""APEX and TwinFlow: one-step generators from a flow model that plays its own critic under a shifted condition."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser, FlowMap
from genkit.interpolants import expand
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, Role, drop_condition
from genkit.training.parts.apex_targets import consistency_residual, enhancement, gap_weight, mixed_velocity
from genkit.training.parts.condition_shift import ConditionShiftConfig, ShiftConfig, relative_square, warn_if_invisible
from genkit.training.parts.losses import barron, evaluating, mean_of_squares, wide
from genkit.training.parts.reference import Reference
from genkit.training.parts.times import Beta, TimeLaw, Uniform

Part = Literal["e2e", "mul", "any", "end", "adv"]
_SHORT = 0.05  # longest jump of "mul", as a share of t


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Guidance(_Section):
    """The guidance that is taught: the target grows by ``rho (u_c - u_n)`` of a reference, at ``low <= t <= high``.

    ``ema_decay``: 0 makes the student its own reference, 1 keeps it as it was at the start, between is an average;
    ``rho`` is ``w - 1`` for the second and ``1 - 1/w`` for the others.
    """

    guidance_scale: float = Field(5.0, ge=0, allow_inf_nan=False)
    ema_decay: float = Field(0.99, ge=0, le=1)
    low: float = Field(0.0, ge=0, le=1)
    high: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _known(self):
        if self.guidance_scale == 1:
            raise ValueError("guidance_scale=1 teaches none; set guidance to null")
        if self.guidance_scale == 0 and self.ema_decay < 1:
            raise ValueError("guidance_scale=0 is taught by a frozen reference alone (ema_decay=1)")
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        return self


class Released(_Section):
    """The objective of the released code.

    ``parts``: what items are for, in turn; see :class:`Apex`. ``times``: law of ``t`` but on ``e2e``. ``delta``,
    ``intervals`` (``N``; 0: no consistency, and of the jumps only ``mul`` is regressed) and ``clamp``: of the
    consistency residual. ``dm_weight``: of the distribution matching. ``error``: ``barron`` is about the root of the
    mean square, ``mse`` the mean square.
    """

    form: Literal["released"] = "released"
    parts: tuple[Part, ...] = Field(("e2e", "mul", "any", "adv"), min_length=1)
    times: TimeLaw = Beta(a=1, b=1)
    guidance: Guidance | None = Guidance()
    intervals: int = Field(2, ge=0)
    delta: float = Field(0.01, gt=0, lt=1)
    clamp: float = Field(1.0, gt=0)
    dm_weight: float = Field(0.5, ge=0)
    error: Literal["barron", "mse"] = "barron"

    @model_validator(mode="after")
    def _possible(self):
        if self.dm_weight and not {"e2e", "adv"} <= set(self.parts):
            raise ValueError(f"dm_weight={self.dm_weight:g} needs the parts e2e and adv, got {list(self.parts)}")
        if self.intervals == 0 and self.error == "barron" and self.dm_weight:
            raise ValueError(
                "intervals=0 leaves e2e to distribution matching alone, which diverges with error='barron'; use "
                "error=mse, or intervals of 1 or more"
            )
        if not self.regressed:
            raise ValueError(f"intervals=0 regresses the parts mul and adv, got {list(self.parts)}")
        return self

    @property
    def regressed(self) -> float:
        """Share of the items that are regressed."""
        return sum(self.intervals > 0 or p in ("mul", "adv") for p in self.parts) / len(self.parts)


class Literally(_Section):
    """The objective as the paper writes it, on the diagonal alone: no one-step generator (see :class:`Apex`).

    ``mix``: ``lambda``. ``fake_grad``: let gradients of the fake flow's loss pass through its samples.
    ``fake_reuse_noise``: make them noisy by the noise and time of the item instead of fresh ones. ``warmup``: share of
    the run over which ``mix`` and ``fake_weight`` grow from 0: without a pretrained network, both harm at first.
    """

    form: Literal["literal"]
    mix: float = Field(0.5, ge=0, le=1)
    mix_weight: float = Field(1.0, ge=0)
    fake_weight: float = Field(1.0, ge=0)
    times: TimeLaw = Uniform()
    fake_grad: bool = False
    fake_reuse_noise: bool = False
    warmup: float = Field(0.0, ge=0, lt=1)


Form: TypeAlias = Annotated[Released | Literally, Field(discriminator="form")]


class ApexConfig(ObjectiveConfig):
    """``loss``: which of the two objectives, with its settings. ``shift``: what makes the fake branch."""

    loss: Form = Released()
    shift: ShiftConfig = ConditionShiftConfig()
    condition_dropout: float = Field(0.1, ge=0, le=1)


class Apex(Objective):
    """Self-adversarial flow distillation; ``u_fake`` is the same network's other branch (:mod:`condition_shift`).

    Released: ``L = mean [ w l(u(x_t,t,s), target) ] + k mean_e2e l(u(eps,1,0), sg(u - g))``, items taking turns at

    ======= ==================================== ===================================================================
    ``e2e``  ``t = 1``, ``s = 0``, ``x_t = eps``  flow velocity (guided), made consistent by
    ``mul``  ``s`` in ``[0.95 t, t]``             ``r`` is ``consistency_residual`` of ``parts/apex_targets.py``:
    ``any``  ``s`` in ``[0, t]``                  ``target = sg(u - clamp(r))``
    ``end``  ``s = 0``
    ``adv``  ``s = t``, fake branch               flow velocity of the student's own one-step samples; ``w = 1``
    ======= ==================================== ===================================================================

    and ``g = clamp(v_fake - v)`` at fresh noise on the one-step samples ``eps - u``: descending
    ``KL(fake || real)`` needs ``dL/du`` along it. ``w`` is :func:`~genkit.training.parts.apex_targets.gap_weight`. With
    ``shift.kind=time_sign`` this is TwinFlow.

    Literal: ``mix_weight |v - (1 - lambda) v_data - lambda sg v_fake|^2 + fake_weight |v_fake(x', t') - v'|^2`` with
    ``v'`` the flow from fresh noise to ``x_fake = x_t - t v``, and ``x'`` on it. At ``t = 1`` its optimum is the mean
    under the condition: it makes no one-step generator, and it narrows the flow it is trained on.

    Any path: targets are velocities and jumps. No dropout, so that both branches are the same network. Items whose
    condition the shift does not change are left out of the fake branch.

    Source: "Self-Adversarial One Step Generation via Condition Shifting", arXiv 2604.12322; TwinFlow, arXiv 2512.05150.
    """

    Config = ApexConfig
    needs_flow_map = True

    student: FlowMap

    def __init__(self, config: ApexConfig, student: FlowMap, teacher: Denoiser | None = None):
        super().__init__(config, student, teacher)
        self.branch = config.shift.make(student)
        self._learns_shift = any(p.requires_grad for p in self.branch.parameters())
        guidance = config.loss.guidance if isinstance(config.loss, Released) else None
        self.reference = None if guidance is None else Reference(student, guidance.ema_decay)
        self._looked = False

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = dict(super().roles)
        if self._learns_shift:
            roles["shift"] = Role(self.branch)
        return roles | ({} if self.reference is None else self.reference.roles)

    def phases(self, step: int):
        return (Phase("student", trains=("student", "shift") if self._learns_shift else ("student",)),)

    def updated(self, phase: Phase) -> None:
        if self.reference is not None:
            self.reference.update()

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        condition, _ = drop_condition(batch, rng, self.config.condition_dropout)
        with evaluating(self.student_module):
            step = self._released if isinstance(self.config.loss, Released) else self._literal
            loss, logs = step(batch, condition, rng)
            # A micro-batch without a fake item must leave the shift a gradient, for other processes to add to.
            loss = loss + sum(0 * p.sum() for p in self.branch.parameters() if p.requires_grad)
            yield Loss(loss, logs)

    # -- as released -------------------------------------------------------------------------------------------

    def _released(self, batch: Batch, condition: Condition, rng: ItemRNG) -> tuple[Tensor, dict[str, Tensor]]:
        c: Released = self.config.loss
        shape, dtype = batch.x0.shape[1:], batch.x0.dtype
        turn = batch.index % len(c.parts)
        is_part = {
            name: torch.isin(turn, torch.tensor([i for i, p in enumerate(c.parts) if p == name]).to(turn))
            for name in ("e2e", "mul", "any", "end", "adv")
        }
        t, reach = c.times.draw(rng), rng.uniform()
        eps, z, z_dm = (rng.normal(shape, dtype=dtype) for _ in range(3))
        t_dm = rng.uniform()
        e2e, adv = is_part["e2e"], is_part["adv"]
        t = torch.ones_like(t).where(e2e, t)
        reach = torch.ones_like(t).where(e2e | is_part["end"], reach)
        reach = torch.where(is_part["mul"], _SHORT * reach, reach.where(~adv, 0))
        s = t - reach * t

        adv_i, real_i = adv.nonzero()[:, 0], (~adv).nonzero()[:, 0]
        x0 = batch.x0
        if len(adv_i):
            with torch.no_grad():
                ends = torch.ones_like(t[adv_i]), torch.zeros_like(t[adv_i])
                own = self.student.jump(z[adv_i], *ends, condition.index(adv_i))
            x0 = x0.index_copy(0, adv_i, own.to(dtype))
        x = eps.where(expand(e2e, eps), self.student.interpolant.interpolate(x0, eps, t))
        target = wide(self.student.interpolant.velocity(x0, eps, t))

        errors, logs = [], {}
        if len(adv_i):
            v, changed = self.branch.velocity(self.student, x[adv_i], t[adv_i], condition.index(adv_i))
            error = self._error(wide(v), target[adv_i]) * changed
            errors.append(error)
            logs["adversarial"] = error.detach().mean()
        matching = []
        if len(real_i):
            at = x[real_i], t[real_i], s[real_i]
            own_condition = condition.index(real_i)
            u = wide(self.student.average_velocity(*at, own_condition))
            goal = self._guided(target[real_i], at[0], at[1], own_condition)
            goal = self._consistent(goal, u.detach(), *at, own_condition)
            on = torch.ones_like(e2e[real_i]) if c.intervals else is_part["mul"][real_i]
            error = self._error(u, goal) * gap_weight(at[1], at[2]) * on
            errors.append(error)
            logs["flow"] = error.detach().sum() / on.sum().clamp(min=1)
            e2e_i = e2e[real_i].nonzero()[:, 0]
            if len(e2e_i) and c.dm_weight:
                fresh = t_dm[real_i][e2e_i], z_dm[real_i][e2e_i]
                error = self._matching(u[e2e_i], at[0][e2e_i], *fresh, own_condition.index(e2e_i), logs)
                matching.append(error)
        # Shares, not counts: a batch is then the mean of its micro-batches.
        total = torch.cat(errors).sum() / (len(t) * c.regressed)
        if matching:
            total = total + c.dm_weight * torch.cat(matching).sum() / (len(t) * c.parts.count("e2e") / len(c.parts))
        return total, logs

    def _error(self, u: Tensor, target: Tensor) -> Tensor:
        m = mean_of_squares(u - target)
        return barron(m, 1e-3) if self.config.loss.error == "barron" else m

    def _guided(self, target: Tensor, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        g = self.config.loss.guidance
        if g is None or self.reference is None:
            return target
        if not condition.values:
            raise ValueError("objective.loss.guidance: the samples have no condition; set it to null")
        with self.reference.network() as network:
            cond, null = network.many(x, t, [condition, condition.null()])
            push = enhancement(g.guidance_scale, g.ema_decay == 1) * (cond.velocity - null.velocity)
        return target + push * expand((t >= g.low) & (t <= g.high), push)

    def _consistent(self, target: Tensor, u: Tensor, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        c = self.config.loss
        if not c.intervals:
            return target

        def average(x_: Tensor, t_: Tensor, s_: Tensor) -> Tensor:
            return self.student.average_velocity(x_, t_, s_, condition)

        with torch.no_grad():
            r = consistency_residual(average, u, x, t, s, target, delta=c.delta, intervals=c.intervals)
            return u - r.clamp(-c.clamp, c.clamp)

    def _matching(self, u: Tensor, eps: Tensor, t: Tensor, z: Tensor, condition: Condition, logs) -> Tensor:
        """The error of one-step items against ``sg(u - g)``."""
        c = self.config.loss
        with torch.no_grad():
            x = self.student.interpolant.interpolate((eps - u).to(eps.dtype), z, t)
            real = wide(self.student.average_velocity(x, t, t, condition))
            fake, changed = self.branch.velocity(self.student, x, t, condition)
            g = wide(fake) - real
            logs["visibility"] = relative_square(g, real)
            if not self._looked:
                warn_if_invisible(float(logs["visibility"]))
                self._looked = True
            goal = u - g.clamp(-c.clamp, c.clamp)
        error = self._error(u, goal) * changed
        logs["matching"] = error.detach().mean()
        return error

    # -- as written --------------------------------------------------------------------------------------------

    def _literal(self, batch: Batch, condition: Condition, rng: ItemRNG) -> tuple[Tensor, dict[str, Tensor]]:
        c: Literally = self.config.loss
        shape, dtype, path = batch.x0.shape[1:], batch.x0.dtype, self.student.interpolant
        ramp = min(1.0, batch.progress / c.warmup) if c.warmup else 1.0
        t, t_fake = c.times.draw(rng), rng.uniform()
        eps, z = (rng.normal(shape, dtype=dtype) for _ in range(2))
        if c.fake_reuse_noise:
            t_fake, z = t, eps
        x = path.interpolate(batch.x0, eps, t)
        v = wide(self.student.average_velocity(x, t, t, condition))
        with torch.no_grad():
            fake, changed = self.branch.velocity(self.student, x, t, condition)
            if not self._looked:
                warn_if_invisible(float(relative_square(wide(fake) - v, v)))
                self._looked = True
        mix = expand(ramp * c.mix * changed, v)
        mixed = mean_of_squares(v - mixed_velocity(path.velocity(batch.x0, eps, t), wide(fake), mix))

        own = path.convert(v, "flow_prediction", "sample", x, t)
        own = own if c.fake_grad else own.detach()
        follows, changed = self.branch.velocity(self.student, path.interpolate(own, z, t_fake), t_fake, condition)
        error = mean_of_squares(wide(follows) - path.velocity(own, z, t_fake)) * changed
        logs = {"mixed": mixed.detach().mean(), "adversarial": error.detach().mean()}
        return c.mix_weight * mixed.mean() + c.fake_weight * ramp * error.mean(), logs
