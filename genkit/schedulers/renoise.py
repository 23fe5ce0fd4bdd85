"""Sampling with a network that predicts clean samples at once: jump to clean data, put noise back, repeat."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.schedulers.base import Generators, PathScheduler, StepOutput


class RenoiseScheduler(PathScheduler):
    """``x <- alpha(s) x0 + sigma(s) (sqrt(1 - eta) eps + sqrt(eta) n)``: ``x0``, ``eps`` predicted, ``n`` fresh noise.

    For students of one time whose clean-sample prediction is a sample, not a mean: ``eta = 1`` is multistep consistency
    sampling, ``eta = 0`` goes on with the predicted noise, which is a DDIM step. The last step ends in ``x0``.

    Args:
        num_train_timesteps: what times are multiplied by to give native timesteps, where there is no ``path``.
        shift: times are mapped by ``shift t / (1 + (shift - 1) t)``.
        eta: share of the noise that is fresh, in [0, 1].
        trained_times: the only times the student knows, decreasing in (0, 1], before the shift; fewer steps take them
            evenly from the first on.
        path: config of the scheduler under which the student's teacher was trained, with its ``_class_name``, where the
            path is not the linear one. See :meth:`from_scheduler`.
        timestep_spacing: see :class:`genkit.schedulers.base.PathScheduler`.

    Raises:
        ValueError: ``eta`` outside its range; in ``set_timesteps``, more steps than ``trained_times``, or a start at
            ``alpha = 0`` under a model that predicts ``epsilon``.

    Source: Song et al., "Consistency models", arXiv 2303.01469, algorithm 1; ``eta``: Song et al., "Denoising diffusion
    implicit models", arXiv 2010.02502.
    """

    _flow_spacing = "uniform"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        eta: float = 1.0,
        trained_times: Sequence[float] | None = None,
        path: dict | None = None,
        timestep_spacing: str = "uniform",
    ):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: must lie in [0, 1]")
        super().__init__()

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, timesteps=None, mu=None):
        """As the base class; of ``sigmas`` beside ``trained_times`` only the number counts.

        Flux's pipelines give some whether or not they were asked for.
        """
        if self.config.trained_times is not None and sigmas is not None:
            num_inference_steps, sigmas = len(sigmas), None
        super().set_timesteps(num_inference_steps, device, sigmas, timesteps, mu)

    def _spaced(self, n):
        times = self.config.trained_times
        if times is None:
            return super()._spaced(n)
        if n is None or not 1 <= n <= len(times):
            raise ValueError(f"num_inference_steps={n}: the student knows {len(times)} times, accepted are 1 to that")
        return torch.tensor([times[i * len(times) // n] for i in range(n)], dtype=torch.float64)

    def _start(self, t):
        if self.prediction_type == "epsilon" and self.interpolant.alpha(t[0]) == 0:
            raise ValueError(f"the first time is {t[0].item():g}, where alpha = 0 and epsilon leaves x0 open")
        return t

    def step(
        self, model_output: Tensor, timestep, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> StepOutput | tuple[Tensor]:
        """One jump and the noise of the next time; ``model_output`` as the network gives it, ``(B, ...)``."""
        i = self._index(timestep)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        t, s = self.times[i], self.times[i + 1]

        def view(prediction_type: str) -> Tensor:
            return self.interpolant.convert(model_output.to(x.dtype), self.prediction_type, prediction_type, x, t)

        clean = view("sample")
        if s > 0:
            eta = self.config.eta
            noise = torch.zeros_like(x)
            if eta < 1:
                noise = noise + (1 - eta) ** 0.5 * view("epsilon")
            if eta > 0:
                noise = noise + eta**0.5 * self._noise(x, generator)
            clean = self.interpolant.interpolate(clean, noise, s)
        self._step_index = i + 1
        clean = clean.to(sample.dtype)
        return StepOutput(prev_sample=clean) if return_dict else (clean,)
