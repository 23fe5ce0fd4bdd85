"""Sampling with a flow map: any number of jumps, deterministic or with re-noising."""

from dataclasses import dataclass

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genkit.interpolants import Interpolant, Linear, from_scheduler, scheduler_prediction_type
from genkit.registry import unknown


@dataclass
class FlowMapSchedulerOutput(BaseOutput):
    """``prev_sample``: the sample at the end of the step, shape ``(B, ...)``."""

    prev_sample: Tensor


class FlowMapScheduler(SchedulerMixin, ConfigMixin):
    """``x <- X(x, t, s) = x + (s - t) u`` on the times ``t_k = 1 - k/N``; the model output is the average velocity.

    Whoever calls the network must give it both times of a step: :meth:`jump_target` names the second.

    Args:
        num_train_timesteps: what times are multiplied by to give native timesteps, where there is no ``path``.
        shift: times are mapped by ``shift t / (1 + (shift - 1) t)``.
        stochastic: every step jumps to clean data and adds fresh noise for its end time (multistep consistency
            sampling) instead of jumping from time to time.
        path: config of the scheduler under which the student's teacher was trained, with its ``_class_name``, where the
            path is not the linear one. See :meth:`from_teacher`.

    Attributes:
        times: times of the jumps and the final 0, float64 ``(N + 1,)``, after :meth:`set_timesteps`.

    ``times`` holds the times of the jumps and the final 0, float64 ``(N + 1,)``, after :meth:`set_timesteps`.

    Source: Boffi et al., arXiv 2505.18825, section 2; re-noising: Song et al., "Consistency models", arXiv 2303.01469,
    algorithm 1.
    """

    _compatibles: list[str] = []
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        stochastic: bool = False,
        path: dict | None = None,
    ):
        if shift <= 0:
            raise ValueError(f"shift={shift}: must be positive")
        self.interpolant, self.prediction_type = self._path()
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._set(torch.linspace(1, 1 / num_train_timesteps, num_train_timesteps, dtype=torch.float64), None)

    @classmethod
    def from_teacher(cls, scheduler, **kwargs) -> "FlowMapScheduler":
        """The scheduler of a student whose teacher is sampled with ``scheduler``; ``kwargs`` as in the constructor."""
        if isinstance(scheduler, cls):
            return cls.from_config(scheduler.config, **kwargs)
        if isinstance(from_scheduler(scheduler), Linear):
            return cls(num_train_timesteps=scheduler.config.get("num_train_timesteps", 1000), **kwargs)
        path = {k: v for k, v in scheduler.config.items() if v is None or isinstance(v, (bool, int, float, str, list))}
        return cls(path={**path, "_class_name": type(scheduler).__name__}, **kwargs)

    def _path(self) -> tuple[Interpolant, str]:
        """The path of the network's inputs, and what its raw output is before it is read as a velocity."""
        path = self.config.path
        if path is None:
            return Linear(self.config.num_train_timesteps), "flow_prediction"
        name = path.get("_class_name")
        cls = getattr(diffusers, str(name), None)
        if cls is None:
            raise ValueError(
                unknown("path['_class_name']", name, [n for n in dir(diffusers) if n.endswith("Scheduler")])
            )
        teacher = cls.from_config({k: v for k, v in path.items() if k != "_class_name"})
        return from_scheduler(teacher), scheduler_prediction_type(teacher)

    # -- times ------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the times of the jumps, by exactly one of the first three.

        Args:
            num_inference_steps: ``N`` equal steps of time before the shift.
            sigmas: times in (0, 1], decreasing; shifted like the former (Flux gives them).
            timesteps: native timesteps, decreasing, taken as they are.
            mu: logarithm of a shift that replaces the configured one (Flux's dynamic shifting).

        Raises:
            ValueError: none or several of the three, or times that do not decrease within (0, 1].
        """
        given = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "timesteps": timesteps}
        chosen = [name for name, value in given.items() if value is not None]
        if chosen == ["num_inference_steps", "sigmas"] and num_inference_steps == len(sigmas):  # type: ignore[arg-type]
            chosen = ["sigmas"]
        if len(chosen) != 1:
            raise ValueError(f"give exactly one of {', '.join(given)}; got {chosen or 'none'}")
        if timesteps is not None:
            t = self.interpolant.time(torch.as_tensor(timesteps))
        else:
            if sigmas is not None:
                t = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
            else:
                if num_inference_steps is None or num_inference_steps < 1:
                    raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
                t = 1 - torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps
            shift = self.config.shift if mu is None else float(torch.tensor(mu).exp())
            t = shift * t / (1 + (shift - 1) * t)
        if not len(t) or not bool(((t > 0) & (t <= 1)).all()) or not bool((t[:-1] > t[1:]).all()):
            raise ValueError(f"{chosen[0]} must give strictly decreasing times in (0, 1], got {t.tolist()[:8]}")
        self._set(t, device)
        self.num_inference_steps = len(t)

    def _set(self, t: Tensor, device) -> None:
        self.times = torch.cat((t, t.new_zeros(1)))
        self.timesteps = self.interpolant.timestep(t).to(device)
        self.sigmas = self.times.float()
        self._step_index = self._begin_index = None

    @property
    def step_index(self) -> int | None:
        """Index of the step to come, ``None`` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step where a pipeline starts part of the way."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at ``begin_index`` (image to image)."""
        self._begin_index = begin_index

    def _index(self, timestep) -> int:
        if self._step_index is not None:
            return self._step_index
        if self._begin_index is not None:
            return self._begin_index
        value = torch.as_tensor(timestep, dtype=torch.float32).flatten()[0].cpu()
        hits = (self.timesteps.cpu() == value).nonzero()
        if not len(hits):
            raise ValueError(f"timestep={value.item()} is not one of scheduler.timesteps")
        return int(hits[0])

    def jump_target(self, timestep) -> Tensor:
        """Time in [0, 1] that the network must be asked to jump to from ``timestep``; a float64 scalar."""
        return self.times[-1] if self.config.stochastic else self.times[self._index(timestep) + 1]

    # -- steps ------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMapSchedulerOutput | tuple[Tensor]:
        """One jump; ``model_output`` is ``u(x, t, s)`` for ``s = jump_target(timestep)``, both ``(B, ...)``."""
        i = self._index(timestep)
        wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x = wide + float(self.jump_target(timestep) - self.times[i]) * model_output
        if self.config.stochastic and i + 1 < len(self.timesteps):
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = self.interpolant.interpolate(x, noise, self.times[i + 1])
        self._step_index = i + 1
        x = x.to(sample.dtype)
        return FlowMapSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``alpha x0 + sigma eps`` at native ``timestep`` ``(B,)`` (image to image)."""
        t = self.interpolant.time(torch.as_tensor(timestep, device=sample.device))
        return self.interpolant.interpolate(sample, noise, t).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """:meth:`scale_noise` under the argument order of variance-preserving schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
