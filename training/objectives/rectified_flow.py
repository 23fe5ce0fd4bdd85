"""Rectified flow: a straight-line flow through given couplings of noise and data; reflow and k-step distillation."""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser
from genkit.denoisers.on_path import OnPath
from genkit.interpolants import Linear
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, drop_condition
from genkit.training.parts.first_order import first_order_scheduler
from genkit.training.parts.losses import mean_of_squares
from genkit.training.parts.targets import guided_velocity
from genkit.training.parts.times import Grid, TimeLaw, Uniform


class _Coupling(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Independent(_Coupling):
    """Data and noise drawn apart: the first rectified flow."""

    kind: Literal["independent"] = "independent"


class Stored(_Coupling):
    """The source's own ``x0`` and ``eps``: of a model (``data.name=pairs``), of two distributions (``transfer``)."""

    kind: Literal["pairs"] = "pairs"


class Taught(_Coupling):
    """Pairs made on the fly: noise, and where ``num_steps`` Euler or Heun steps of the teacher's flow take it.

    A teacher on another path is put on the linear one, exactly.
    """

    kind: Literal["teacher"] = "teacher"
    num_steps: int = Field(20, ge=1)
    solver: Literal["euler", "heun"] = "euler"
    guidance_scale: float = Field(1.0, ge=0)


class RectifiedFlowConfig(ObjectiveConfig):
    """Settings of :class:`RectifiedFlow`.

    ``coupling``: ``{kind: independent | pairs | teacher}``. ``times``: the law of ``t``; ``{law: grid, steps: k}``
    makes it the distillation to ``k`` steps.
    """

    coupling: Annotated[Independent | Stored | Taught, Field(discriminator="kind")] = Independent()
    times: TimeLaw = Uniform(low=1e-3)
    condition_dropout: float = Field(0.1, ge=0, le=1)


class RectifiedFlow(Objective):
    """``E |v(x_t, t) - (eps - x0)|^2`` with ``x_t = (1 - t) x0 + t eps``, a mean over dimensions, on coupled ends.

    On independent ends this is flow matching (1-rectification). On pairs of the flow's own noise and endpoints it
    straightens the flow (reflow), which keeps its law and raises no convex transport cost; ``k``-reflow is ``k`` runs,
    each on the pairs of the last. With ``t`` on the grid ``{1/k, ..., 1}`` it distils to ``k`` Euler steps: for one,
    the loss is the error of the endpoint, ``|x0_hat - x0|^2``, and only from pairs whose ends determine each other.

    Raises:
        ValueError: a student on another path than the linear one; a teacher that is not used, or one that is missing;
            a source without pairs.

    Source: Liu et al., "Flow straight and fast", arXiv 2209.03003, algorithm 1 and section 2.2 (reflow, distillation);
    InstaFlow, arXiv 2309.06380; time laws: Lee et al., arXiv 2405.20320.
    """

    Config = RectifiedFlowConfig
    needs_teacher = "optional"

    def __init__(self, config: RectifiedFlowConfig, student: Denoiser, teacher: Denoiser | None = None):
        if not isinstance(student.interpolant, Linear):
            raise ValueError(
                f"objective='rectified_flow' trains on the path Linear, the student is on "
                f"{type(student.interpolant).__name__}; use objective.name=rectified_diffusion, which keeps a model's "
                "own path, or give the model a flow-matching scheduler"
            )
        if isinstance(config.coupling, Taught) != (teacher is not None):
            had = "has no teacher; set teacher" if teacher is None else "takes no teacher; set coupling.kind=teacher"
            raise ValueError(f"coupling.kind={config.coupling.kind!r} {had}")
        super().__init__(config, student, teacher)
        if teacher is not None and not isinstance(teacher.interpolant, Linear):
            self.teacher = OnPath(teacher)
        self.needs_samples = not isinstance(config.coupling, Taught)  # type: ignore[misc]

    def scheduler(self, scheduler):
        """As the pipeline's; where times are a grid, Euler steps on that grid, without the shift of the original."""
        if isinstance(self.config.times, Grid):
            return first_order_scheduler(scheduler)
        return super().scheduler(scheduler)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        condition, _ = drop_condition(batch, rng, self.config.condition_dropout)
        t = self.config.times.draw(rng)
        x0, eps = self._ends(batch, rng)
        x = self.student.interpolant.interpolate(x0, eps, t)
        residual = self.student(x, t, condition).velocity - (eps - x0)
        yield Loss(mean_of_squares(residual).mean(), {})

    def _ends(self, batch: Batch, rng: ItemRNG) -> tuple[Tensor, Tensor]:
        coupling = self.config.coupling
        if isinstance(coupling, Stored):
            return batch.x0, paired_noise(batch)
        eps = rng.normal(batch.x0.shape[1:], dtype=batch.x0.dtype)
        if isinstance(coupling, Independent):
            return batch.x0, eps
        assert self.teacher is not None
        return flow_endpoint(self.teacher, eps, batch.condition, coupling), eps


def paired_noise(batch: Batch) -> Tensor:
    """The noise ``eps`` that the source gives with each ``x0``.

    Raises:
        ValueError: a source that gives none, or of another shape (pictures that are encoded to latents).
    """
    if "eps" not in batch.fields:
        raise ValueError(
            f"the data gives {sorted(batch.fields)}, and this objective needs pairs of x0 and eps: make them with "
            "`genkit pairs` and set data.name=pairs, or couple two sources with data.name=transfer"
        )
    eps = batch.fields["eps"]
    if eps.shape != batch.x0.shape:
        raise ValueError(f"the data pairs x0 of shape {tuple(batch.x0.shape)} with eps of shape {tuple(eps.shape)}")
    return eps.to(batch.x0.dtype)


@torch.no_grad()
def flow_endpoint(teacher: Denoiser, eps: Tensor, condition: Condition, how: Taught) -> Tensor:
    """Where the flow of ``teacher`` takes ``eps`` ``(B, ...)`` from ``t = 1`` to 0, by ``how.num_steps`` steps."""
    times = torch.linspace(1, 0, how.num_steps + 1, dtype=torch.float64, device=eps.device)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return guided_velocity(teacher, x, t.to(x.dtype).expand(len(x)).contiguous(), condition, how.guidance_scale)

    x = eps
    for now, then in zip(times[:-1], times[1:], strict=True):
        h = (then - now).to(x.dtype)
        v = velocity(x, now)
        if how.solver == "heun" and then > 0:  # some predictions say nothing of the velocity at t = 0
            v = (v + velocity(x + h * v, then)) / 2
        x = x + h * v
    return x
