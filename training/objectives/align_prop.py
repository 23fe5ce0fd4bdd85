"""AlignProp: the reward's gradient through the sampler's last steps, at random how many."""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from genkit.rng import ItemRNG
from genkit.training.objectives._reward import RewardObjective, RewardObjectiveConfig
from genkit.training.objectives.base import shared


class NormalStart(BaseModel):
    """Call ``i`` of ``1 ... N - 1`` with weight ``exp(-(i / N - mean)^2 / (2 std^2))``: a truncated normal law."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    law: Literal["normal"] = "normal"
    mean: float = Field(0.84, ge=0, le=1)
    std: float = Field(0.1, gt=0)

    def check(self, calls: int) -> None:
        """Refuse ``calls`` of which none is left."""
        if calls < 2:
            raise ValueError(f"first_live.law='normal' needs num_inference_steps of at least 2, got {calls}")

    def draw(self, rng: ItemRNG, calls: int) -> Tensor:
        """First calls with gradient, int64 ``(B,)``."""
        i = torch.arange(1, calls, dtype=torch.float64, device=rng.items.device)
        below = (-(((i / calls - self.mean) / self.std) ** 2) / 2).softmax(0).cumsum(0)
        return 1 + torch.searchsorted(below[:-1], rng.uniform(dtype=torch.float64))


class UniformStart(BaseModel):
    """All calls alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    law: Literal["uniform"]

    def check(self, calls: int) -> None:
        """Any number of calls will do."""

    def draw(self, rng: ItemRNG, calls: int) -> Tensor:
        """As :meth:`NormalStart.draw`."""
        return rng.integers(calls)


class FixedStart(BaseModel):
    """Always ``call``, which is DRaFT-K for ``K = N - call``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    law: Literal["fixed"]
    call: int = Field(ge=0)

    def check(self, calls: int) -> None:
        """Refuse a call that is not made."""
        if self.call >= calls:
            raise ValueError(f"first_live.call={self.call}: accepted are 0 to num_inference_steps - 1 = {calls - 1}")

    def draw(self, rng: ItemRNG, calls: int) -> Tensor:
        """As :meth:`NormalStart.draw`."""
        return torch.full_like(rng.items, self.call)


class AlignPropConfig(RewardObjectiveConfig):
    """``first_live``: the law of the first call that gradients pass, drawn once for the batch."""

    first_live: Annotated[NormalStart | UniformStart | FixedStart, Field(discriminator="law")] = NormalStart()

    @model_validator(mode="after")
    def _within(self):
        self.first_live.check(self.num_inference_steps)
        return self


class AlignProp(RewardObjective):
    """DRaFT-K with ``K = N - i`` for a random first live call ``i``: ``E_i g . sum_{m >= i} (prod_{l > m} A_l) B_m``.

    Published with 50 stochastic steps (``noise_scale=1``), ``i`` normal about 42 with deviation 5, and the loss
    ``|r - target|``.

    Source: Prabhudesai et al., "Aligning text-to-image diffusion models with reward backpropagation", arXiv 2310.03739.
    """

    Config = AlignPropConfig

    def estimate(self, run, x, batch, rng):
        live = int(self.config.first_live.draw(shared(batch, rng), len(run)))
        with torch.no_grad():
            x = run.walk(x, 0, live)
        yield self.judged(run.walk(x, live, len(run)), run, batch)
