"""What genkit's schedulers share: the path they walk, the times they visit, and the attributes that pipelines touch."""

import math
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genkit.interpolants import Interpolant, Linear, VarianceExploding, from_scheduler, scheduler_prediction_type
from genkit.registry import unknown
from genkit.schedulers.origin import DYNAMIC_SHIFT, diffusers_scheduler, warn_of_lost_grid

Generators = torch.Generator | list[torch.Generator] | None

SPACINGS = ("uniform", "linspace", "leading", "trailing")


@dataclass
class StepOutput(BaseOutput):
    """``prev_sample``: the sample at the end of the step, shape ``(B, ...)``."""

    prev_sample: Tensor


class PathScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler that walks an interpolant ``x_t = alpha(t) x0 + sigma(t) eps`` from noise to data.

    A subclass decorates its ``__init__`` with ``register_to_config``, takes at least the arguments below, calls
    ``super().__init__()`` and implements ``step``. ``from_scheduler(pipe.scheduler)`` makes one from the
    scheduler that a model came with, and so does, in Diffusers' way, ``from_config(pipe.scheduler.config)``.

    Config:
        num_train_timesteps: what times are multiplied by to give native timesteps, where there is no ``path``.
        shift: times are mapped by ``shift t / (1 + (shift - 1) t)``.
        path: config of the Diffusers scheduler under which the model was trained, with its ``_class_name``; without,
            the path is the linear one. That of a flow also says whether the shift depends on the image's size (FLUX.1
            dev) or not (SD3, FLUX.1 schnell), by ``use_dynamic_shifting``.
        timestep_spacing: where ``num_inference_steps`` puts the steps: ``uniform`` is ``t_k = 1 - k/N``; ``linspace``,
            ``leading`` and ``trailing`` are the integer timesteps of Diffusers' DDIM, but on the linear path
            ``linspace`` is what Diffusers' flow-matching schedulers visit. A spacing that was set there is taken over;
            other grids (``use_karras_sigmas``, ``use_exponential_sigmas``, ``use_beta_sigmas``, ``use_lu_lambdas``,
            DPM-Solver's meaning of a spacing) are not, which is logged once: pass ``sigmas`` or ``timesteps`` instead.

    Attributes:
        interpolant, prediction_type: the path of the network's inputs, and what its raw output is.
        times: time of every evaluation and the final one, float64, after :meth:`set_timesteps`.
        timesteps: the native timesteps of the evaluations, one a network call.
        remembers_samples: whether what is kept from step to step involves samples, so that guiders that move those are
            refused; where it is predictions alone, a subclass says ``False``. Nothing kept needs no word.
    """

    _compatibles: list[str] = []
    # The spacing in place of that of Diffusers' flow-matching schedulers, which have no such setting.
    _flow_spacing = "linspace"
    order = 1
    init_noise_sigma = 1.0
    remembers_samples = True

    def __init__(self):
        config = self.config
        if config.get("shift", 1.0) <= 0:
            raise ValueError(f"shift={config.shift}: must be positive")
        if config.get("timestep_spacing", "uniform") not in SPACINGS:
            raise ValueError(unknown("timestep_spacing", config.timestep_spacing, SPACINGS))
        self.interpolant, self.prediction_type = self._path()
        self.num_inference_steps: int | None = None
        total = config.num_train_timesteps
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._generator: Generators = None
        self._set(torch.linspace(1, 1 / total, total, dtype=torch.float64), None)
        self._plan = list(_tensors(vars(self)))

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Diffusers' loader looks the base class up in the module that defines the component.
        module = sys.modules.get(cls.__module__)
        if module is not None:  # a file executed by hand has none
            vars(module).setdefault("SchedulerMixin", SchedulerMixin)

    # -- the path -----------------------------------------------------------------------------------------------

    @classmethod
    def from_scheduler(cls, scheduler, **kwargs):
        """This scheduler for a model that is sampled with ``scheduler``; ``kwargs`` as in the constructor.

        Raises:
            ValueError: a scheduler of a family without interpolant.
        """
        config = dict(scheduler.config)
        if isinstance(scheduler, PathScheduler):
            return cls(**{k: v for k, v in config.items() if k in cls._settings()} | kwargs)
        return cls.from_config({**config, "_class_name": type(scheduler).__name__}, **kwargs)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs):
        """As in Diffusers; the config of a scheduler of Diffusers becomes the path.

        Raises:
            ValueError: a scheduler of a family without interpolant.
        """
        foreign: dict[str, Any] = {}
        if isinstance(config, Mapping):
            if "path" not in kwargs:
                foreign = cls._foreign(config)
            if foreign or config.get("_class_name", cls.__name__) != cls.__name__:
                # Settings that mean nothing here would be kept, saved, and warned of at every loading.
                config = {k: v for k, v in config.items() if k in cls._settings() or k == "_use_default_values"}
            # Those of the shift come from the path.
            config = {k: v for k, v in config.items() if k not in DYNAMIC_SHIFT or k in cls._settings()} | foreign
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        own = made[0] if return_unused_kwargs else made
        if foreign and "timestep_spacing" not in kwargs and not own.config.get("trained_times"):
            linear = isinstance(own.interpolant, Linear)
            visited = None if linear else lambda n: own.interpolant.timestep(own._spaced(n))
            warn_of_lost_grid(cls.__name__, own.config, visited)
        return made

    @classmethod
    def _settings(cls) -> set[str]:
        return set(cls._get_init_keys(cls)) - {"self"}

    @classmethod
    def _foreign(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the config of somebody else's scheduler means here."""
        if "path" in config:
            return {}
        # The config of an instance does not name its class.
        telling = {"beta_schedule": "DDIMScheduler", "max_image_seq_len": "FlowMatchEulerDiscreteScheduler"}
        name = config.get("_class_name") or next((v for k, v in telling.items() if k in config), None)
        if name is None or name == cls.__name__:
            return {}
        original = diffusers_scheduler(name, config)
        plain = (bool, int, float, str, list)
        path = {k: v for k, v in config.items() if v is None or isinstance(v, plain)} | {"_class_name": name}
        if not isinstance(from_scheduler(original), Linear):
            return {"path": path}
        spacing = cls._flow_spacing if name.startswith("FlowMatch") else "uniform"
        flow = {"shift": config.get("shift", config.get("flow_shift", 1.0)) or 1.0, "timestep_spacing": spacing}
        return {"path": path} | {k: v for k, v in flow.items() if k in cls._settings()}

    def _path(self) -> tuple[Interpolant, str]:
        path = self.config.path
        if path is None:
            return Linear(self.config.num_train_timesteps), "flow_prediction"
        original = diffusers_scheduler(path.get("_class_name"), path)
        interpolant = from_scheduler(original)
        self.register_to_config(**{k: original.config[k] for k in DYNAMIC_SHIFT if k in original.config})
        if isinstance(interpolant, VarianceExploding):
            raise ValueError(
                f"path['_class_name']={path['_class_name']!r} scales the network's input and output itself; accepted "
                "are flow-matching and variance-preserving schedulers"
            )
        return interpolant, scheduler_prediction_type(original)

    # -- times --------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the times of the steps, by exactly one of the first, third and fourth, and forget the last run.

        Args:
            num_inference_steps: ``N``, spaced by ``timestep_spacing`` before the shift.
            sigmas: decreasing; on the linear path times in (0, 1], shifted like the former (Flux gives them); on others
                Diffusers' noise levels ``sigma / alpha``. A final 0 may be left out.
            timesteps: native timesteps, decreasing, taken as they are.
            mu: logarithm of a shift that replaces the configured one (Flux's dynamic shifting; the shift itself under
                ``time_shift_type="linear"``). Without effect, as in Diffusers, where the ``path`` has
                ``use_dynamic_shifting=False``: Flux's pipelines always give one.

        Raises:
            ValueError: none or several of the three, times that do not decrease within (0, 1], or ``mu`` on a path that
                is not linear.
        """
        given = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "timesteps": timesteps}
        chosen = [name for name, value in given.items() if value is not None]
        if chosen == ["num_inference_steps", "sigmas"] and num_inference_steps == len(sigmas):  # type: ignore[arg-type]
            chosen = ["sigmas"]
        if len(chosen) != 1:
            raise ValueError(f"give exactly one of {', '.join(given)}; got {chosen or 'none'}")
        if mu is not None and not isinstance(self.interpolant, Linear):
            raise ValueError(
                f"mu={mu} shifts times of the linear path, and this scheduler walks {type(self.interpolant).__name__}: "
                "the pipeline's model is a flow; make the scheduler with from_scheduler(pipe.scheduler)"
            )
        shift = self.config.shift
        if mu is not None and self.config.get("use_dynamic_shifting", True):
            shift = mu if (self.config.path or {}).get("time_shift_type") == "linear" else math.exp(mu)
        if timesteps is not None:
            t = self.interpolant.time(torch.as_tensor(timesteps).cpu())
            t = t[:-1] if len(t) and t[-1] == 0 else t
        elif sigmas is not None:
            t = _shifted(self._time_of_sigma(torch.as_tensor(sigmas, dtype=torch.float64).cpu()), shift)
        else:
            t = _shifted(self._spaced(num_inference_steps), shift)
        if not len(t) or not bool(((t > 0) & (t <= 1)).all()) or not bool((t[:-1] > t[1:]).all()):
            raise ValueError(f"{chosen[0]} must give strictly decreasing times in (0, 1], got {t.tolist()[:8]}")
        self._set(self._start(t), device)
        self.num_inference_steps = len(t)
        self._plan = list(_tensors(vars(self)))

    def _start(self, t: Tensor) -> Tensor:
        """``t`` as the solver can walk them: one that is not defined at some first times moves or refuses those."""
        return t

    def _spaced(self, n: int | None) -> Tensor:
        if n is None or n < 1:
            raise ValueError(f"num_inference_steps={n}: must be at least 1")
        spacing = self.config.get("timestep_spacing", "uniform")
        if spacing == "uniform":
            return 1 - torch.arange(n, dtype=torch.float64) / n
        total = int(getattr(self.interpolant, "num_train_timesteps", self.config.num_train_timesteps))
        if n > total:
            raise ValueError(f"num_inference_steps={n}: timestep_spacing={spacing!r} has at most {total} timesteps")
        if spacing == "linspace" and isinstance(self.interpolant, Linear):
            # Their least time is shifted already, and then once more with the others.
            dynamic = self.config.get("use_dynamic_shifting", False)
            end = 1 / total if dynamic else _shifted(1 / total, self.config.shift)
            return torch.linspace(1, end, n, dtype=torch.float64)
        if spacing == "linspace":
            steps = torch.linspace(0, total - 1, n, dtype=torch.float64).round().flip(0)
        elif spacing == "leading":
            offset = (self.config.path or {}).get("steps_offset", 0)
            steps = (torch.arange(n, dtype=torch.float64) * (total // n)).flip(0) + offset
        else:
            steps = torch.arange(n, dtype=torch.float64).mul(-total / n).add(total).round() - 1
        return self.interpolant.time(steps)

    def _time_of_sigma(self, sigmas: Tensor) -> Tensor:
        if len(sigmas) and sigmas[-1] == 0:
            sigmas = sigmas[:-1]
        if isinstance(self.interpolant, Linear):
            return sigmas
        # sigma / alpha rises with t on every path: halve the interval until float64 is exhausted.
        low, high = torch.zeros_like(sigmas), torch.ones_like(sigmas)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.interpolant.sigma(middle) > sigmas * self.interpolant.alpha(middle)
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        top = self.interpolant.sigma(high.new_ones(())) / self.interpolant.alpha(high.new_ones(()))
        if len(sigmas) and sigmas[0] > top * (1 + 1e-6):
            raise ValueError(f"sigmas={sigmas.tolist()[:8]}: the path's noise level ends at {top.item():g}")
        return high

    def _set(self, t: Tensor, device) -> None:
        """Take the times of the steps, float64 ``(N,)``; multistage solvers override it to visit some times again."""
        self.times = torch.cat((t, t.new_zeros(1)))
        self.timesteps = self.interpolant.timestep(t).to(device)
        self.sigmas = self.times.float()
        self._step_index = self._begin_index = None

    def remembered(self) -> list[str]:
        """Names of the attributes that hold tensors of earlier steps: any that were not there when times were set."""
        plan = {id(tensor) for tensor in self._plan}
        # A pipeline may replace the public ones by copies on its device; the path keeps tables of a device.
        shared = ("times", "timesteps", "sigmas", "interpolant", "_plan")
        kept = {k: v for k, v in vars(self).items() if k not in shared}
        return sorted(k for k, v in kept.items() if any(id(tensor) not in plan for tensor in _tensors(v)))

    @property
    def step_index(self) -> int | None:
        """Index of the evaluation to come, ``None`` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first evaluation where a pipeline starts part of the way."""
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
        hits = (self.timesteps.cpu().float() == value).nonzero()
        if not len(hits):
            raise ValueError(f"timestep={value.item()} is not one of scheduler.timesteps")
        # Where a solver visits a time twice, the second visit begins the step from there (image to image).
        return int(hits[:2][-1])

    # -- noise --------------------------------------------------------------------------------------------------

    def set_generator(self, generator: Generators) -> None:
        """Draw from ``generator``, or one a sample, wherever ``step`` is given none (SD3 and Flux never give one).

        It stays until the next call of this method, and goes on from where the last run left it.
        """
        self._generator = generator

    def _noise(self, like: Tensor, generator: Generators) -> Tensor:
        generator = self._generator if generator is None else generator
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    # -- samples ------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        """The sample itself."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``alpha x0 + sigma eps`` at native ``timestep`` ``(B,)`` (image to image)."""
        t = self.interpolant.time(torch.as_tensor(timestep, device=sample.device))
        return self.interpolant.interpolate(sample, noise, t).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """:meth:`scale_noise` under the argument order of variance-preserving schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _shifted(t, shift: float):
    return shift * t / (1 + (shift - 1) * t)


def _tensors(value, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor with an axis that can be reached from ``value``."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, Collection) and not isinstance(value, (str, bytes, range)):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _tensors(vars(value), seen)
