"""DRaFT-LV: the reward's gradient through the last step, at several noisy copies of each sample."""

from typing import Literal

import torch
from pydantic import Field

from genkit.training.objectives._reward import RewardObjective, RewardObjectiveConfig
from genkit.training.objectives.base import Phase


class DRaFTLVConfig(RewardObjectiveConfig):
    """``copies``: ``n``, of each sample. ``reduction``: of the ``1 + n`` losses of a sample; under ``mean`` more
    copies do not change what ``max_grad_norm`` clips.
    """

    copies: int = Field(2, ge=0)
    reduction: Literal["mean", "sum"] = "mean"


class DRaFTLV(RewardObjective):
    """``g(x_0) . d x_0 / d theta + sum_i g(xhat^i) . d xhat^i / d theta``, over ``1 + n`` where ``reduction="mean"``.

    ``x_0`` is the end of the rollout, whose last step alone is differentiated (DRaFT-1). With ``t*`` the time of the
    last network call, and noise of their own, copies are put back there and predicted anew::

        x^i = alpha(t*) sg(x_0) + sigma(t*) eps_i,    xhat^i = D_theta(x^i, t*)

    Every copy has its own backward, so that memory is one network call. Held-out rewards and statistics are of
    ``x_0`` alone.

    Source: Clark et al., "Directly fine-tuning diffusion models on differentiable rewards", arXiv 2309.17400.
    """

    Config = DRaFTLVConfig
    recomputes = False  # one call is alive at a time

    def phases(self, step):
        return (Phase("student", trains=("student",), backwards=1 + self.config.copies),)

    def estimate(self, run, x, batch, rng):
        c, last, path = self.config, len(run) - 1, self.student.interpolant
        share = 1 / (1 + c.copies) if c.reduction == "mean" else 1.0
        with torch.no_grad():
            x = run.walk(x, 0, last)
        x = run.walk(x, last, last + 1)
        loss = self.judged(x, run, batch)
        yield loss._replace(value=share * loss.value)
        x = x.detach()
        for _ in range(c.copies):
            noise = rng.normal(x.shape[1:], dtype=x.dtype)
            z = path.interpolate(x, noise, run.grid.times[last])
            loss = self.judged(run.step(run.predict(z, last), last, last + 1), run, batch, watch=False)
            yield loss._replace(value=share * loss.value)
