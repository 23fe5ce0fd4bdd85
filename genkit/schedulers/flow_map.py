"""Sampling with a flow map: any number of jumps, deterministic or with re-noising."""

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.schedulers.base import Generators, PathScheduler, StepOutput


class FlowMapScheduler(PathScheduler):
    """``x <- X(x, t, s) = x + (s - t) u`` on the times ``t_k = 1 - k/N``; the model output is the average velocity.

    Whoever calls the network must give it both times of a step: :meth:`jump_target` names the second.

    Args:
        num_train_timesteps: what times are multiplied by to give native timesteps, where there is no ``path``.
        shift: times are mapped by ``shift t / (1 + (shift - 1) t)``.
        stochastic: every step jumps to clean data and adds fresh noise for its end time (multistep consistency
            sampling) instead of jumping from time to time.
        path: config of the scheduler under which the student's teacher was trained, with its ``_class_name``, where the
            path is not the linear one. See :meth:`from_scheduler`.
        timestep_spacing: see :class:`genkit.schedulers.base.PathScheduler`.

    Source: Boffi et al., arXiv 2505.18825, section 2; re-noising: Song et al., "Consistency models", arXiv 2303.01469,
    algorithm 1.
    """

    _flow_spacing = "uniform"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        stochastic: bool = False,
        path: dict | None = None,
        timestep_spacing: str = "uniform",
    ):
        super().__init__()

    def jump_target(self, timestep) -> Tensor:
        """Time in [0, 1] that the network must be asked to jump to from ``timestep``; a float64 scalar."""
        return self.times[-1] if self.config.stochastic else self.times[self._index(timestep) + 1]

    def step(
        self,
        model_output: Tensor,
        timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor]:
        """One jump; ``model_output`` is ``u(x, t, s)`` for ``s = jump_target(timestep)``, both ``(B, ...)``."""
        i = self._index(timestep)
        wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x = wide + float(self.jump_target(timestep) - self.times[i]) * model_output
        if self.config.stochastic and i + 1 < len(self.timesteps):
            x = self.interpolant.interpolate(x, self._noise(x, generator), self.times[i + 1])
        self._step_index = i + 1
        x = x.to(sample.dtype)
        return StepOutput(prev_sample=x) if return_dict else (x,)
