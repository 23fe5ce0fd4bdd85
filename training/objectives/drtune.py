"""DRTune: the reward's gradient to steps all along the sampler, none of it through the network's input."""

import torch
from pydantic import Field, model_validator

from genkit.training.objectives._reward import RewardObjective, RewardObjectiveConfig
from genkit.training.objectives.base import shared


class DRTuneConfig(RewardObjectiveConfig):
    """``live_steps``: ``K``, how many calls are trained, equally spaced. ``early_stop``: ``m``; the rollout ends at one
    of the last ``m`` calls; 1 is the last.
    """

    live_steps: int = Field(2, ge=1)
    early_stop: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _within(self):
        least = self.num_inference_steps - self.early_stop + 1
        if not 1 <= self.live_steps <= least:
            raise ValueError(
                f"live_steps={self.live_steps}, early_stop={self.early_stop}: the shortest rollout has {least} of "
                f"num_inference_steps={self.num_inference_steps} calls; accepted are 1 <= live_steps <= "
                "num_inference_steps - early_stop + 1"
            )
        return self


class DRTune(RewardObjective):
    """``g . d xhat / d theta`` of a rollout that sees its own states as constants, ``D_theta(sg(x_t), t)``.

    At call ``q``, uniform over the last ``m``, the clean sample is estimated in one jump, ``xhat``. Of the calls up to
    ``q``, ``K`` are trained, ``(q + 1) // K`` apart from a uniform offset; ``q`` is one of them or not. Steps keep the
    direct path of the state, at constant velocity, so that on the linear path a trained step gives
    ``-(t_i - t_{i+1}) g . dv_i / d theta``, the jump ``-t_q g . dv_q / d theta``, and there is no product of Jacobians.
    Call and offset are one for the batch.

    Source: Wu et al., "Deep reward supervisions for tuning text-to-image diffusion models", arXiv 2405.00760.
    """

    Config = DRTuneConfig

    def estimate(self, run, x, batch, rng):
        c, once = self.config, shared(batch, rng)
        stop = len(run) - 1 - int(once.integers(c.early_stop))
        apart = (stop + 1) // c.live_steps
        offset = int(once.integers(stop + 1 - (c.live_steps - 1) * apart))
        trained = range(offset, stop + 1, apart)[: c.live_steps]
        for i in range(stop + 1):
            with torch.set_grad_enabled(i in trained):
                prediction = run.predict(x.detach(), i)
            x = run.advance(prediction, i, x=x) if i < stop else run.step(prediction, i, len(run), x=x)
        yield self.judged(x, run, batch)
