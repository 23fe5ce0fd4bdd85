"""Diffusers' side of a guider: what a modular pipeline calls, turned into points for :meth:`Guider.guide`."""

import json
from functools import cached_property

import diffusers
import torch
from diffusers.guiders import BaseGuidance
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from genkit._diffusers import GuiderOutput, identifier, prepare_batch, quiet_construction
from genkit.guidance.captured import Call, CapturedDenoiser, Run
from genkit.interpolants import from_scheduler, scheduler_prediction_type
from genkit.registry import members, unknown
from genkit.schedulers.base import PathScheduler

_FIRST_ORDER = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler")


class ModularProtocol(BaseGuidance):
    """``BaseGuidance`` as modular pipelines drive it; subclasses bring ``active(t)`` and ``guide(point, state)``.

    A modular pipeline tells a guider the timestep and nothing of the scheduler, the sample or the prediction type. The
    first and the last come from ``scheduler_config``, which :func:`genkit.attach` fills in and which is saved with the
    guider; the sample is read off the network's call.
    """

    moves_sample = False
    _input_predictions = ["pred_cond", "pred_uncond"]  # type: ignore[assignment]
    # Text encoders read this before any step is known: the most that is ever asked for, whatever the window says.
    num_conditions = 2

    def __init__(self, start: float, stop: float, enabled: bool, scheduler_config: dict | None):
        with quiet_construction():
            super().__init__(start, stop, enabled)
        self._switched_on = enabled  # pipelines call enable() on their own; that must not undo the user's choice
        self.scheduler_config = scheduler_config
        self._run = Run(self)
        self._calls: list[Call] = []
        self._handle: RemovableHandle | None = None
        self._last_step = self._prepared = self._steps = 0

    def bind(self, scheduler):
        """A copy that knows the path of ``scheduler``'s samples (its class and config, saved with the guider)."""
        from_scheduler(scheduler), scheduler_prediction_type(scheduler)  # an unknown family is refused here
        self._check_moves(scheduler)
        return self.new(scheduler_config=json.loads(scheduler.to_json_string()))

    @cached_property
    def _path(self):
        if self.scheduler_config is None:
            raise ValueError(
                f"{type(self).__name__} does not know the scheduler of this modular pipeline (scheduler_config=None): "
                "use genkit.attach(pipe, guider) instead of pipe.update_components(guider=guider)"
            )
        scheduler = _scheduler(self.scheduler_config)
        self._check_moves(scheduler)
        return from_scheduler(scheduler), scheduler_prediction_type(scheduler)

    def _check_moves(self, scheduler) -> None:
        name = type(scheduler).__name__
        if self.moves_sample and name not in _FIRST_ORDER:
            raise ValueError(
                f"scheduler={name}: {type(self).__name__} moves the sample, which modular pipelines do not hand out; "
                f"accepted are {', '.join(_FIRST_ORDER)}, whose step is determined by a prediction"
            )

    def set_state(self, step: int, num_inference_steps: int, timestep) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if step == 0 or step < self._last_step:
            self._run.reset()
        self._steps = num_inference_steps
        self._last_step, self._now = step, torch.as_tensor(timestep).flatten()[0].cpu()
        self.release()
        self._calls, self._prepared = [], 0

    def prepare_inputs(self, data) -> list:
        return [prepare_batch(data, slot, name) for slot, name in self._branches()]

    def prepare_inputs_from_block_state(self, data, input_fields: dict) -> list:
        return [prepare_batch(input_fields, slot, name, data) for slot, name in self._branches()]

    def _branches(self) -> list[tuple[int, str]]:
        interpolant, _ = self._path
        branches = list(enumerate(self._input_predictions))
        return branches if self.active(interpolant.time(self._now)) else branches[:1]

    @property
    def is_conditional(self) -> bool:
        return self._prepared == 1

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        self.release()
        self._network = denoiser
        self._prepared += 1

        def keep(_module, args, kwargs):
            if self._last_step == 0 and self._prepared == 1:
                try:
                    shape = Call(args, kwargs).shape(denoiser)
                    self.check(shape)
                    self.check_network(denoiser, *self._path, shape)
                except ValueError:
                    self.release()  # the pipeline will not: its network must be left without this hook
                    raise
            del self._calls[self._prepared - 1 :]  # one call a branch; a second one replaces it
            self._calls.append(Call(args, kwargs))

        self._handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        super().cleanup_models(denoiser)
        self.release()

    def release(self) -> None:
        """Take the hook off the network: at the end of each call, and of a run that an error or Ctrl-C broke off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, data: list) -> GuiderOutput:
        raw = {identifier(batch): batch.noise_pred for batch in data}
        cond, uncond = raw["pred_cond"], raw.get("pred_uncond")
        path, rows = self._path, (0, len(cond))
        denoiser = CapturedDenoiser(self._network, *path, self._calls, cond, uncond, rows, self._now)  # type: ignore
        guided = self._run.evaluate(denoiser, self._next_time() if self.moves_sample else None)
        assert self._run.point is not None
        self._calls = []
        return GuiderOutput(pred=guided.unmoved(self._run.point).raw, pred_cond=cond, pred_uncond=uncond)

    def _next_time(self) -> Tensor:
        """Where the scheduler's step ends, as far as the number of steps determines it.

        Raises:
            ValueError: steps other than the scheduler's own.
        """
        assert self.scheduler_config is not None
        scheduler = _scheduler(self.scheduler_config)
        scheduler.set_timesteps(self._steps)
        timesteps = scheduler.timesteps.double()
        planned = float(timesteps[self._last_step])
        if abs(planned - float(self._now)) > 1e-3 * float(timesteps.max()):
            raise ValueError(
                f"timestep={float(self._now):g}: {type(self).__name__} must know where a step ends, and "
                f"{type(scheduler).__name__} with {self._steps} steps would be at {planned:g}; leave out custom "
                "timesteps, sigmas and dynamic shifting, or use a classic pipeline"
            )
        times = torch.cat((from_scheduler(scheduler).time(timesteps), timesteps.new_zeros(1)))
        return times[self._last_step + 1]


def _scheduler(config: dict):
    name = config["_class_name"]
    ours = {cls.__name__: cls for cls in members("genkit.schedulers", PathScheduler).values()}
    cls = ours.get(name) or getattr(diffusers, name, None)
    if cls is None:
        raise ValueError(unknown("scheduler_config['_class_name']", name, ours))
    return cls.from_config(config)
