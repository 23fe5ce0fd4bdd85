"""Improved MeanFlow: regress to a target that no network enters, and make guidance a condition."""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser, FlowMap
from genkit.denoisers.scalars import without
from genkit.rng import ItemRNG
from genkit.training.objectives._average_velocity import AverageVelocity, AverageVelocityConfig, guided
from genkit.training.objectives.base import Batch, ObjectiveConfig, drop_condition


class ToldGuidance(ObjectiveConfig):
    """Guidance that the student is told, and so can be given any when it samples.

    Every item draws ``guidance_scale`` with density proportional to ``w^-exponent`` on ``[1, high]``, and with
    ``interval`` the ends ``t_low ~ U[0, 1/2]`` and ``t_high ~ U[1/2, 1]`` of the times at which it is guided. The
    student embeds them, with ``default`` and ``default_interval`` for a condition that does not name them.
    """

    high: float = Field(8.0, gt=1)
    exponent: float = Field(1.0, ge=0)
    interval: bool = True
    default: float = Field(2.0, ge=1)
    default_interval: tuple[float, float] = (0.0, 1.0)

    @model_validator(mode="after")
    def _sensible(self):
        low, high = self.default_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"default_interval={self.default_interval} must be [low, high] with 0 <= low < high <= 1")
        if not self.interval and "default_interval" in self.model_fields_set:
            raise ValueError(f"default_interval={self.default_interval} has no effect with interval=false")
        if self.default > self.high:
            raise ValueError(f"default={self.default:g} is above high={self.high:g}, which is never trained")
        return self

    @property
    def scalars(self) -> dict[str, float]:
        """What the student embeds, with defaults."""
        low, high = self.default_interval
        ends = {"t_low": low, "t_high": high} if self.interval else {}
        return {"guidance_scale": self.default, **ends}

    def draw(self, rng: ItemRNG, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(guidance_scale, t_low, t_high)``, ``(B,)`` each; items under ``on`` ``(B,)`` are guided at all times."""
        u, low, high = rng.uniform(), rng.uniform() / 2, (1 + rng.uniform()) / 2
        power = 1 - self.exponent
        w = self.high**u if power == 0 else (1 + u * (self.high**power - 1)) ** (1 / power)
        if not self.interval:
            on = torch.ones_like(on)
        return w, low.where(~on, 0), high.where(~on, 1)


class ImprovedMeanFlowConfig(AverageVelocityConfig):
    """Settings of :class:`ImprovedMeanFlow`, beside those of its base.

    ``guidance_scale``: guidance that is trained into the student, 1 for none; or a :class:`ToldGuidance`, for a student
    that can be given any.
    """

    diagonal_fraction: float = Field(0.5, ge=0, le=1)
    weight_offset: float = Field(0.01, gt=0)
    guidance_scale: Annotated[float, Field(ge=1)] | ToldGuidance = 1.0


class ImprovedMeanFlow(AverageVelocity):
    """``E r / sg(r + c)^p``, ``r = |u(x_t,t,s) + (t - s) sg[du/dt] - v_g|^2``, ``du/dt`` along ``(u(x,t,t), 1)``.

    ``v_g = v + (1 - 1/w) [u(x,t,t|c) - u(x,t,t|null)]`` without gradient, ``v`` the velocity of the data: the fixed
    point is guidance of scale ``w``. With a teacher ``v_g`` is its guided velocity. ``w`` and the interval of times in
    which it holds are fixed, or drawn and told to the student (:class:`ToldGuidance`); on the diagonal the interval
    is everything. Items whose condition was dropped keep the plain ``v``, and are told ``w = 1``.

    The tangent is the student's own diagonal, which the paper calls the boundary form: the networks here have no second
    head for it. Any path and prediction type.

    Source: Geng et al., "Improved mean flows: on the challenges of fastforward generative models", arXiv 2512.02012.
    """

    Config = ImprovedMeanFlowConfig

    def __init__(self, config: ImprovedMeanFlowConfig, student: FlowMap, teacher: Denoiser | None = None):
        if isinstance(config.guidance_scale, ToldGuidance):
            student.add_scalars(config.guidance_scale.scalars)
        super().__init__(config, student, teacher)

    def _target(self, batch: Batch, rng: ItemRNG, x: Tensor, t: Tensor, s: Tensor, v: Tensor):
        law, dropout = self.config.guidance_scale, self.config.condition_dropout
        if not isinstance(law, ToldGuidance):
            condition, dropped = drop_condition(batch, rng, dropout)
            return condition, guided(self, x, t, condition, v, law, 1 - 1 / law, dropped)
        if not batch.condition.values:
            raise ValueError(
                f"guidance_scale={law}: the model is unconditional, so there is nothing to guide by; set 1"
            )
        w, low, high = law.draw(rng, t == s)
        told = {"guidance_scale": w, "t_low": low, "t_high": high}
        none = {"guidance_scale": 1.0, "t_low": 0.0, "t_high": 1.0}  # of the unconditional branch
        names = law.scalars
        extended = batch.condition.with_values(
            {name: told[name] for name in names}, {name: torch.full_like(t, none[name]) for name in names}
        )
        condition, dropped = drop_condition(replace(batch, condition=extended), rng, dropout)
        outside = dropped | (t < low) | (t > high)
        asked = condition if self.teacher is None else without(condition, names)  # a teacher is not told
        return condition, guided(self, x, t, asked, v, w, 1 - 1 / w, outside)

    @torch.no_grad()
    def _tangent(self, x: Tensor, t: Tensor, condition: Condition, target: Tensor) -> Tensor:
        return self.student(x, t, condition).velocity
