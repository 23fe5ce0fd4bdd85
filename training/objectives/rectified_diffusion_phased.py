"""Phased rectified diffusion: first-order within each of a few stretches of time, from data and a teacher, no pairs."""

from collections.abc import Iterator

import torch
from pydantic import Field, model_validator
from torch import Tensor

from genkit.denoisers.base import Condition
from genkit.interpolants import Interpolant, expand
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, drop_condition
from genkit.training.parts.first_order import error, first_order_scheduler


class PhasedConfig(ObjectiveConfig):
    """Settings of :class:`PhasedRectifiedDiffusion`.

    ``num_phases`` stretches of time of equal length, at whose ends the student is sampled; ``teacher_steps``: DDIM
    steps of the teacher over all of them, and ``guidance_scale`` its guidance. ``num_times``: how many times are
    trained, evenly spaced, a phase its share. ``huber_c``: ``null`` means squares.
    """

    num_phases: int = Field(4, ge=1)
    teacher_steps: int = Field(40, ge=1)
    num_times: int = Field(1000, ge=1)
    guidance_scale: float = Field(3.0, ge=0)
    huber_c: float | None = Field(1e-3, gt=0)
    condition_dropout: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _divides(self):
        for name in ("teacher_steps", "num_times"):
            if getattr(self, name) % self.num_phases:
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of num_phases={self.num_phases}")
        return self


class PhasedRectifiedDiffusion(Objective):
    """``E huber(x_hat_e - x_e)``: every phase ``[t_e, t_s]`` gets one noise that carries its start to its end.

    ``x_s = alpha_s x0 + sigma_s eps`` of data and free noise; ``x_e`` is where the teacher's DDIM takes it. The ends
    that a path through both implies are, with ``D = alpha_s sigma_e - alpha_e sigma_s``::

        eps' = (alpha_s x_e - alpha_e x_s) / D        x0' = (sigma_e x_s - sigma_s x_e) / D

    with no division by ``alpha``, and equal to ``(x_e/alpha_e - x_s/alpha_s) / (n_e - n_s)``, ``n = sigma/alpha``. At a
    time ``t`` of the phase, ``x_t = alpha_t x0' + sigma_t eps'``, and the student's ends there say
    ``x_hat_e = alpha_e x0_hat + sigma_e eps_hat``. Sampled by ``num_phases`` DDIM steps, or a multiple of them.
    What is learned jumps where phases meet: the network's features of time must be able to tell these times apart.

    Source: Wang et al., "Rectified diffusion: straightness is not your need in rectified flow", arXiv 2410.07303,
    section 3.4 (phased).
    """

    Config = PhasedConfig
    needs_teacher = "required"

    def scheduler(self, scheduler):
        """First-order steps that meet the ends of the phases."""
        return first_order_scheduler(scheduler)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c, path, x0 = self.config, self.student.interpolant, batch.x0
        condition, _ = drop_condition(batch, rng, c.condition_dropout)
        number = rng.integers(c.num_phases)  # 0 is the phase that ends at clean data
        place = (rng.integers(c.num_times // c.num_phases) + 1) / (c.num_times // c.num_phases)
        end, start = number / c.num_phases, (number + 1) / c.num_phases
        t = end + (start - end) * place
        x_start = path.interpolate(x0, rng.normal(x0.shape[1:], dtype=x0.dtype), start)
        x_end = self._teach(x_start, start, end, batch.condition)
        clean, noise = implied_ends(path, x_start, start, x_end, end)
        prediction = self.student(path.interpolate(clean, noise, t), t, condition)
        reached = path.interpolate(prediction.sample, prediction.epsilon, end)
        yield Loss(error(reached - x_end, c.huber_c).mean(), {})

    @torch.no_grad()
    def _teach(self, x: Tensor, start: Tensor, end: Tensor, condition: Condition) -> Tensor:
        """The teacher's guided DDIM from ``start`` to ``end``, ``(B,)`` each."""
        c, teacher = self.config, self.teacher
        assert teacher is not None
        guided = c.guidance_scale != 1 and bool(condition.values)
        steps = c.teacher_steps // c.num_phases
        for k in range(steps):
            now, then = (start + (end - start) * (j / steps) for j in (k, k + 1))
            prediction = teacher(x, now, condition) if not guided else None
            if prediction is None:
                cond, null = teacher.many(x, now, [condition, condition.null()])
                prediction = cond.with_raw(null.raw + c.guidance_scale * (cond.raw - null.raw))
            x = teacher.interpolant.interpolate(prediction.sample, prediction.epsilon, then)
        return x


def implied_ends(
    path: Interpolant, x_start: Tensor, start: Tensor, x_end: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """``(x0', eps')``, ``(B, ...)``, whose path passes ``x_start`` at ``start`` and ``x_end`` at ``end``, ``(B,)``."""
    start, end = (t.to(torch.promote_types(x_start.dtype, torch.float32)) for t in (start, end))
    a_s, s_s, a_e, s_e = (expand(v, x_start) for t in (start, end) for v in (path.alpha(t), path.sigma(t)))
    determinant = a_s * s_e - a_e * s_s
    return (s_e * x_start - s_s * x_end) / determinant, (a_s * x_end - a_e * x_start) / determinant
