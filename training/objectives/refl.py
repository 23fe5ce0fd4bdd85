"""ReFL: the reward of a clean sample estimated at a random late step, differentiated through that call alone."""

import torch
from pydantic import Field, model_validator

from genkit.training.objectives._reward import RewardObjective, RewardObjectiveConfig
from genkit.training.objectives.base import shared


class ReFLConfig(RewardObjectiveConfig):
    """``first``, ``last``: the calls between which, both included, the estimate is made; unset they are the last
    quarter, as published.
    """

    first: int | None = Field(None, ge=0)
    last: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _within(self):
        first, last = self.calls
        if not first <= last < self.num_inference_steps:
            raise ValueError(
                f"first={first}, last={last}: accepted are 0 <= first <= last < num_inference_steps="
                f"{self.num_inference_steps}"
            )
        return self

    @property
    def calls(self) -> tuple[int, int]:
        """``(first, last)`` as used."""
        n = self.num_inference_steps
        return n * 3 // 4 if self.first is None else self.first, n - 1 if self.last is None else self.last


class ReFL(RewardObjective):
    """``g(xhat) . d xhat / d theta`` of the one-step estimate ``xhat = D_theta(x_t, t)`` at a late call of the rollout.

    The call is uniform over ``first`` to ``last``, one for the batch; ``x_t`` is a constant. Published with 40 steps,
    calls 30 to 39 and ``loss=max(0, 2 - r)``.

    Source: Xu et al., "ImageReward", arXiv 2304.05977, algorithm 1; its pre-training loss is left out, as in the
    released code.
    """

    Config = ReFLConfig
    recomputes = False  # one call is alive

    def estimate(self, run, x, batch, rng):
        first, last = self.config.calls
        call = first + int(shared(batch, rng).integers(last - first + 1))
        with torch.no_grad():
            x = run.walk(x, 0, call)
        yield self.judged(run.step(run.predict(x, call), call, len(run)), run, batch)
