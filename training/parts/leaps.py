"""What LeapAlign does to a trajectory: where its leaps begin, how they are pinned to it, how far off they land."""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from genkit.rng import ItemRNG
from genkit.training.parts.losses import wide


class UniformPoints(BaseModel):
    """Distinct calls, every choice of ``L`` of those from ``first`` to ``last`` (unset: the last) equally likely."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    law: Literal["uniform"] = "uniform"
    first: int = Field(0, ge=0)
    last: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _ordered(self):
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last={self.last} is before first={self.first}")
        return self

    def check(self, calls: int, leaps: int) -> None:
        """Refuse bounds that ``calls`` do not have, or that hold fewer than ``leaps``."""
        last = calls - 1 if self.last is None else self.last
        if last >= calls or last - self.first + 1 < leaps:
            raise ValueError(
                f"points.first={self.first}, points.last={self.last}: {leaps} leaps need as many of the calls 0 to "
                f"{calls - 1} of num_inference_steps={calls}"
            )

    def draw(self, rng: ItemRNG, calls: int, leaps: int) -> Tensor:
        """Calls in the order in which they are made, int64 ``(B, leaps)``."""
        choices = (calls - 1 if self.last is None else self.last) - self.first + 1
        return self.first + rng.uniform((choices,)).argsort(1)[:, :leaps].sort(1).values


class EvenPoints(BaseModel):
    """Calls ``distance`` of all calls apart, the first of them uniform."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    law: Literal["even"]
    distance: float = Field(0.5, gt=0, lt=1)

    def check(self, calls: int, leaps: int) -> None:
        """Refuse a distance at which ``leaps`` do not fit into ``calls``."""
        if self._apart(calls) * (leaps - 1) >= calls:
            raise ValueError(f"points.distance={self.distance}: {leaps} leaps do not fit into {calls} calls")

    def draw(self, rng: ItemRNG, calls: int, leaps: int) -> Tensor:
        """As :meth:`UniformPoints.draw`."""
        apart = self._apart(calls)
        first = rng.integers(calls - apart * (leaps - 1))
        return first[:, None] + apart * torch.arange(leaps, device=first.device)

    def _apart(self, calls: int) -> int:
        return max(1, round(self.distance * calls))


PointLaw = Annotated[UniformPoints | EvenPoints, Field(discriminator="law")]


def connect(real: Tensor, prediction: Tensor) -> Tensor:
    """``real`` with the gradient of ``prediction``.

    In this order it is ``real`` bit for bit; ``prediction + sg(real - prediction)`` would be off by a rounding.
    """
    return real + (prediction - prediction.detach())


def discount(state: Tensor, alpha: float) -> Tensor:
    """``alpha x + (1 - alpha) sg(x)``: the value of ``state`` with ``alpha`` of its gradient."""
    return state.detach() if alpha == 0 else connect(state.detach(), alpha * state)


def distance(real: Tensor, prediction: Tensor) -> Tensor:
    """Mean of ``|real - prediction|`` over the elements of each sample, ``(B,)``, without gradient."""
    return (wide(real) - wide(prediction)).detach().abs().flatten(1).mean(1)


def similarity_weight(distances: Tensor, tau: float) -> Tensor:
    """``1 / sum_m max(d_m, tau)`` of the distances ``(B, leaps)``: leaps that land far off count less, ``(B,)``."""
    return 1 / distances.clamp(min=tau).sum(1)
