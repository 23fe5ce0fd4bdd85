"""DRaFT and DRaFT-K: the reward's gradient through the sampler, or through its last steps."""

import torch
from pydantic import Field, model_validator

from genkit.training.objectives._reward import RewardObjective, RewardObjectiveConfig


class DRaFTConfig(RewardObjectiveConfig):
    """``live_steps``: ``K``, how many of the last steps gradients pass; unset is all of them."""

    live_steps: int | None = Field(1, ge=1)

    @model_validator(mode="after")
    def _within(self):
        if self.live_steps is not None and self.live_steps > self.num_inference_steps:
            raise ValueError(
                f"live_steps={self.live_steps}: accepted are 1 to num_inference_steps={self.num_inference_steps}"
            )
        return self


class DRaFT(RewardObjective):
    """``E g . sum_i (prod_{m > i} A_m) B_i`` over the last ``K`` of ``N`` steps.

    ``A_m = d x_{m+1} / d x_m`` and ``B_i = d x_{i+1} / d theta`` at fixed ``x_i`` are the sampler's own: the state that
    enters the last ``K`` steps is a constant. With ``recompute`` memory is ``K`` states and one network call.

    Source: Clark et al., "Directly fine-tuning diffusion models on differentiable rewards", arXiv 2309.17400.
    """

    Config = DRaFTConfig

    def estimate(self, run, x, batch, rng):
        n = len(run)
        live = n - (self.config.live_steps or n)
        with torch.no_grad():
            x = run.walk(x, 0, live)
        yield self.judged(run.walk(x, live, n), run, batch)
