"""Laws of the times at which a teacher is asked, as functions of a run's progress."""

from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from genkit.rng import ItemRNG


class _Schedule(BaseModel):
    """``low``, ``high``: the range of times, in [0, 1], at the start."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    low: float = Field(0.02, gt=0, lt=1)
    high: float = Field(0.98, gt=0, le=1)

    def top(self, progress: float) -> float:
        """The highest time at ``progress`` in [0, 1]."""
        return self.high

    def draw(self, rng: ItemRNG, progress: float) -> Tensor:
        """``t ~ U[low, top(progress)]``, a time an item, ``(B,)``."""
        return self.low + (self.top(progress) - self.low) * rng.uniform()

    @model_validator(mode="after")
    def _ordered(self):
        if not self.low < self.top(1.0) <= self.high:
            raise ValueError(f"times end at {self.top(1.0)}: must be above low={self.low} and at most high={self.high}")
        return self


class Constant(_Schedule):
    """``U[low, high]`` throughout."""

    schedule: Literal["constant"] = "constant"


class LinearSchedule(_Schedule):
    """``U[low, top]`` with ``top`` going linearly from ``high`` to ``end``."""

    schedule: Literal["linear"] = "linear"
    end: float = Field(0.5, gt=0, le=1)

    def top(self, progress: float) -> float:
        return self.high + (self.end - self.high) * progress


class StepSchedule(_Schedule):
    """``U[low, high]`` until ``at`` of the run, then ``U[low, end]``. Source: ProlificDreamer, arXiv 2305.16213."""

    schedule: Literal["step"] = "step"
    end: float = Field(0.5, gt=0, le=1)
    at: float = Field(0.2, gt=0, lt=1)

    def top(self, progress: float) -> float:
        return self.high if progress < self.at else self.end


class SquareRoot(_Schedule):
    """``t = high - (high - low) sqrt(progress)`` for all items. Source: Zhu et al., "HiFA", arXiv 2305.18766."""

    schedule: Literal["sqrt"] = "sqrt"

    def draw(self, rng: ItemRNG, progress: float) -> Tensor:
        t = self.high - (self.high - self.low) * progress**0.5
        return torch.full((len(rng),), t, device=rng.items.device)


Schedule: TypeAlias = Annotated[Constant | LinearSchedule | StepSchedule | SquareRoot, Field(discriminator="schedule")]
