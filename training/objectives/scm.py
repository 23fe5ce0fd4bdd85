"""sCM: continuous-time consistency models, trained from data or distilled from a teacher."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from genkit.denoisers.base import Denoiser
from genkit.interpolants import expand
from genkit.rng import ItemRNG
from genkit.schedulers.renoise import RenoiseScheduler
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, Role, drop_condition
from genkit.training.parts.forward_mode import Jvp
from genkit.training.parts.loss_weight import LossWeight
from genkit.training.parts.losses import evaluating, mean_of_squares
from genkit.training.parts.mean_velocity import Angle, consistency_tangent
from genkit.training.parts.targets import guided_velocity
from genkit.training.parts.times import LogitNormal, TimeLaw


class ScmConfig(ObjectiveConfig):
    """Settings of :class:`Scm`.

    ``time``: law of ``t`` on the student's path; on the linear one ``logit_normal`` is the paper's log-normal law of
    ``sigma / alpha`` with the same mean and standard deviation. ``sigma_data``: standard deviation of the data.
    ``guidance_scale``: of the teacher, 1 for none. ``tangent_warmup_steps``: steps over which the unstable part of the
    tangent is brought in. ``tangent_norm``: ``g / (|g| + tangent_offset)`` with ``|g|`` the norm (``l2``) or the root
    mean square (``rms``) of an item. ``learned_weight``: divide the loss by its own scale, learned as a function of
    ``t``. ``jvp``: how the tangent is found (see :mod:`genkit.training.parts.forward_mode`); ``jvp_step``: half the
    distance, in ``t``, of finite differences.
    """

    time: TimeLaw = LogitNormal(mean=-1.0, std=1.4)
    sigma_data: float = Field(0.5, gt=0)
    guidance_scale: float = Field(1.0, ge=0)
    tangent_warmup_steps: int = Field(10_000, ge=0)
    tangent_norm: Literal["l2", "rms"] = "l2"
    tangent_offset: float = Field(0.1, gt=0)
    learned_weight: bool = True
    jvp: Jvp = "auto"
    jvp_step: float = Field(5e-3, gt=0, lt=0.5)
    condition_dropout: float = Field(0.1, ge=0, le=1)


class Scm(Objective):
    """``E [ e^{-w} / (D tan theta) |F - sg(F + g)|^2 + w ]`` with ``g`` the normalised tangent of the clean sample.

    ``F`` is the student's velocity in TrigFlow's coordinates and ``g`` proportional to ``df/d theta`` along the flow of
    the data, or of a teacher with guidance; see :func:`genkit.training.parts.mean_velocity.consistency_tangent`.
    Student and teacher may be of any prediction type, and on any path: the change of coordinates is exact. The student
    becomes a consistency model: its clean sample at ``t`` is the end of the flow, and steps in between add fresh noise.

    With normalised tangents the loss tells little; logged are the mean squares of the tangent before normalisation.

    Raises:
        ValueError: ``guidance_scale`` without a teacher.

    Source: Lu and Song, "Simplifying, stabilizing and scaling continuous-time consistency models", arXiv 2410.11081,
    algorithm 1.
    """

    Config = ScmConfig
    needs_teacher = "optional"

    def __init__(self, config: ScmConfig, student: Denoiser, teacher: Denoiser | None = None):
        super().__init__(config, student, teacher)
        if teacher is None and config.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale={config.guidance_scale:g} needs a teacher, whose velocity is guided; trained from "
                "data it must be 1"
            )
        self.weight = LossWeight() if config.learned_weight else None

    def scheduler(self, scheduler: Any) -> Any:
        return RenoiseScheduler.from_scheduler(scheduler)

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = dict(super().roles)
        if self.weight is not None:
            roles["weight"] = Role(self.weight)
        return roles

    @property
    def uses_forward_mode(self) -> bool:
        return self.config.jvp in ("dual", "func")

    def phases(self, step: int):
        trains = ("student", "weight") if self.weight is not None else ("student",)
        return (Phase("student", trains=trains),)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c, student = self.config, self.student
        path = student.interpolant
        condition, _ = drop_condition(batch, rng, c.condition_dropout)
        t = c.time.draw(rng)
        eps = rng.normal(batch.x0.shape[1:], dtype=batch.x0.dtype)
        x = path.interpolate(batch.x0, eps, t)
        if self.teacher is None:
            v = path.velocity(batch.x0, eps, t)
        else:
            v = guided_velocity(self.teacher, x, t, condition, c.guidance_scale)

        def F(x_: Tensor, t_: Tensor) -> Tensor:
            raw = student(x_, t_, condition).raw
            return Angle(path, t_, c.sigma_data).velocity(raw, student.prediction_type, x_)

        angle = Angle(path, t, c.sigma_data)
        warmup = min(1.0, batch.step / c.tangent_warmup_steps) if c.tangent_warmup_steps else 1.0
        with evaluating(self.student_module):  # the value that the tangent belongs to: no dropout
            value = F(x, t)
            g = consistency_tangent(
                F,
                value.detach(),
                angle,
                v,
                x,
                warmup=warmup,
                jvp=c.jvp,
                step=c.jvp_step,
                network=self.student_module,
            )
        size = mean_of_squares(g)
        norm = (size * (g[0].numel() if c.tangent_norm == "l2" else 1)).sqrt()
        target = value.detach() + g / expand(norm + c.tangent_offset, g)
        r = mean_of_squares(value - target) * angle.cos / angle.sin
        logs = {"tangent": size.mean(), "warmup": size.new_tensor(warmup)}
        if self.weight is not None:
            w = self.weight(t, t)
            logs["weight"] = torch.exp(-w.detach()).mean()
            r = torch.exp(-w) * r + w
        yield Loss(r.mean(), logs)
