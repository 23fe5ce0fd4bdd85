"""Laws of the times that are trained on, and which items of a batch get which part of a method."""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from genkit.rng import ItemRNG


class _Law(BaseModel, ABC):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def draw(self, rng: ItemRNG) -> Tensor:
        """A time an item, ``(B,)``, float32."""


class _Ranged(_Law):
    """A law on [0, 1], stretched to ``[low, high]``."""

    low: float = Field(0.0, ge=0, lt=1)
    high: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        return self

    def draw(self, rng: ItemRNG) -> Tensor:
        return self.low + (self.high - self.low) * self.unit(rng)

    @abstractmethod
    def unit(self, rng: ItemRNG) -> Tensor:
        """Draws of the law on [0, 1], ``(B,)``."""


class Uniform(_Ranged):
    """``t ~ U[low, high]``."""

    law: Literal["uniform"] = "uniform"

    def unit(self, rng: ItemRNG) -> Tensor:
        return rng.uniform()


class LogitNormal(_Ranged):
    """``t = sigmoid(mean + std n)`` with ``n`` standard normal. Source: Esser et al., arXiv 2403.03206, equation 19."""

    law: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)

    def unit(self, rng: ItemRNG) -> Tensor:
        return torch.sigmoid(self.mean + self.std * rng.normal())


class Beta(_Ranged):
    """``t ~ Beta(a, b)``, by inversion of its distribution function."""

    law: Literal["beta"] = "beta"
    a: float = Field(1.0, gt=0)
    b: float = Field(1.0, gt=0)

    def unit(self, rng: ItemRNG) -> Tensor:
        u = rng.uniform()
        if self.a == self.b == 1:
            return u
        from scipy.special import betaincinv

        return torch.from_numpy(betaincinv(self.a, self.b, u.double().cpu().numpy())).to(u)


class UShaped(_Ranged):
    """Density proportional to ``exp(sharpness t) + exp(-sharpness t)`` about the middle of [-1, 1], mapped to [0, 1].

    Source: Lee et al., "Improving the training of rectified flows", arXiv 2405.20320, section 4.1.
    """

    law: Literal["u_shaped"] = "u_shaped"
    sharpness: float = Field(4.0, gt=0)

    def unit(self, rng: ItemRNG) -> Tensor:
        y = (2 * rng.uniform() - 1).double()  # the distribution function of x on [-1, 1] is odd: sinh(a x) / sinh(a)
        x = torch.asinh(y * math.sinh(self.sharpness)) / self.sharpness
        return ((1 + x) / 2).float()


class Grid(_Law):
    """``t`` uniform on ``{1/steps, 2/steps, ..., 1}``."""

    law: Literal["grid"] = "grid"
    steps: int = Field(1, ge=1)

    def draw(self, rng: ItemRNG) -> Tensor:
        return (rng.integers(self.steps) + 1).float() / self.steps


TimeLaw: TypeAlias = Annotated[Uniform | LogitNormal | Beta | UShaped | Grid, Field(discriminator="law")]


def share(index: Tensor, fraction: float) -> Tensor:
    """Mask ``(B,)`` of the items that get a part of a method: ``fraction`` of any run of positions, evenly spread.

    It follows from the items' positions in the run, so that every batch, micro-batch and process count sees the same.
    """
    position = index.double()
    return torch.floor((position + 1) * fraction + 1e-9) > torch.floor(position * fraction + 1e-9)
