"""Rectified diffusion: any diffusion model, in its own form, trained on pairs of its own noise and samples."""

from collections.abc import Iterator

from pydantic import Field

from genkit.interpolants import DiscreteVP, check_prediction_type
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, drop_condition
from genkit.training.objectives.rectified_flow import paired_noise
from genkit.training.parts.first_order import error, first_order_scheduler
from genkit.training.parts.times import Grid, TimeLaw


class RectifiedDiffusionConfig(ObjectiveConfig):
    """Settings of :class:`RectifiedDiffusion`.

    ``space``: the prediction type in which the error is measured, whatever the network predicts; ``sample`` weighs the
    start of the trajectory, ``epsilon`` its end. ``huber_c``: of the pseudo-Huber loss; ``null`` means squares.
    ``times``: by default the 1000 times of a discrete diffusion.
    """

    space: str = "sample"
    huber_c: float | None = Field(1e-3, gt=0)
    times: TimeLaw = Grid(steps=1000)
    condition_dropout: float = Field(0.1, ge=0, le=1)

    def model_post_init(self, context) -> None:
        check_prediction_type(self.space)


class RectifiedDiffusion(Objective):
    """``E huber(f(x_t, t) - f*)`` with ``x_t = alpha x0 + sigma eps`` on matched ``(x0, eps)``, a mean over dimensions.

    ``f`` is the prediction in ``space`` and ``f*`` what the pair says. A network that predicts the pair's own ``eps``
    at all times makes every DDIM step exact, from any time to any other, also where the path is curved. On the linear
    path with ``space=flow_prediction`` and squares this is reflow. The ``sample`` residual is ``sigma / alpha`` times
    the ``epsilon`` one.

    Raises:
        ValueError: a source without pairs; while training, an ``epsilon`` model in a ``space`` other than ``epsilon``
            at ``alpha = 0`` (zero terminal SNR).

    Source: Wang et al., "Rectified diffusion: straightness is not your need in rectified flow", arXiv 2410.07303.
    """

    Config = RectifiedDiffusionConfig

    def scheduler(self, scheduler):
        """DDIM at trailing times, which start at pure noise, where the path is a discrete diffusion's."""
        if isinstance(self.student.interpolant, DiscreteVP):
            return first_order_scheduler(scheduler)
        return super().scheduler(scheduler)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c = self.config
        condition, _ = drop_condition(batch, rng, c.condition_dropout)
        x0, eps, t = batch.x0, paired_noise(batch), c.times.draw(rng)
        path = self.student.interpolant
        prediction = self.student(path.interpolate(x0, eps, t), t, condition)
        residual = prediction.as_type(c.space) - path.target(c.space, x0, eps, t)
        yield Loss(error(residual, c.huber_c).mean(), {})
