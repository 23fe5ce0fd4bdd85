"""Flow matching and its relatives: regress the conditional mean of the path, in any prediction type."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, drop_condition


class FlowMatchingConfig(ObjectiveConfig):
    """Settings of :class:`FlowMatching`.

    ``time_distribution``: ``uniform`` on ``[t_min, t_max]``, or ``logit_normal``, the logistic of
    ``N(time_mean, time_std^2)`` mapped to that interval. ``time_shift`` then maps ``t`` to
    ``shift t / (1 + (shift - 1) t)``, as SD3's scheduler does.
    """

    time_distribution: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: float = 0.0
    time_std: float = Field(1.0, gt=0)
    time_shift: float = Field(1.0, gt=0)
    t_min: float = Field(0.0, ge=0, lt=1)
    t_max: float = Field(1.0, gt=0, le=1)
    condition_dropout: float = Field(0.1, ge=0, le=1)


class FlowMatching(Objective):
    """``E |network(x_t, t) - target|^2`` with ``x_t = alpha x0 + sigma eps``, summed over dimensions.

    The target is ``eps``, ``x0``, ``alpha eps - sigma x0`` or ``alpha' x0 + sigma' eps``, by the student's
    ``prediction_type``; any interpolant. The condition is dropped with probability ``condition_dropout``.

    Source: Lipman et al., "Flow matching for generative modeling", arXiv 2210.02747, equation 9; time distributions:
    Esser et al., arXiv 2403.03206, section 3.1.
    """

    Config = FlowMatchingConfig

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        condition, _ = drop_condition(batch, rng, self.config.condition_dropout)
        t = self._times(rng)
        eps = rng.normal(batch.x0.shape[1:], dtype=batch.x0.dtype)
        x = self.student.interpolant.interpolate(batch.x0, eps, t)
        target = self.student.interpolant.target(self.student.prediction_type, batch.x0, eps, t)
        residual = self.student(x, t, condition).raw.to(target.dtype) - target
        loss = residual.square().flatten(1).sum(1).mean()
        yield Loss(loss, {})

    def _times(self, rng: ItemRNG) -> Tensor:
        c = self.config
        u = (
            rng.uniform()
            if c.time_distribution == "uniform"
            else torch.sigmoid(c.time_mean + c.time_std * rng.normal())
        )
        t = c.t_min + (c.t_max - c.t_min) * u
        return c.time_shift * t / (1 + (c.time_shift - 1) * t)
