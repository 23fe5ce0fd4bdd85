"""What is minimised of a reward ``r`` ``(B,)``."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F


class LinearLoss(BaseModel):
    """``-r``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["linear"] = "linear"

    def __call__(self, reward: Tensor) -> Tensor:
        return -reward


class HingeLoss(BaseModel):
    """``max(0, threshold - r)``: what is good enough is left alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["hinge"] = "hinge"
    threshold: float

    def __call__(self, reward: Tensor) -> Tensor:
        return F.relu(self.threshold - reward)


class TargetLoss(BaseModel):
    """``|r - value|``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["target"] = "target"
    value: float

    def __call__(self, reward: Tensor) -> Tensor:
        return (reward - self.value).abs()


RewardLoss = Annotated[LinearLoss | HingeLoss | TargetLoss, Field(discriminator="kind")]
