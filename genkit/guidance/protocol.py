"""Diffusers' side of a guider: what a modular pipeline calls, turned into points for :meth:`Guider.guide`."""

import json
from functools import cached_property

import diffusers
import torch
from diffusers.guiders import BaseGuidance
from torch import nn
from torch.utils.hooks import RemovableHandle

from genkit._diffusers import GuiderOutput, identifier, prepare_batch, quiet_construction
from genkit.guidance.captured import Call, CapturedDenoiser, Run
from genkit.interpolants import from_scheduler, scheduler_prediction_type
from genkit.registry import members, unknown
from genkit.schedulers.base import PathScheduler


class ModularProtocol(BaseGuidance):
    """``BaseGuidance`` as modular pipelines drive it; subclasses bring ``active(t)`` and ``guide(point, state)``.

    A modular pipeline tells a guider the timestep and nothing of the scheduler, the sample or the prediction type. The
    first and the last come from ``scheduler_config``, which :func:`genkit.attach` fills in and which is saved with the
    guider; the sample is read off the network's call.
    """

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
        self._last_step = self._prepared = 0

    def bind(self, scheduler):
        """A copy that knows the path of ``scheduler``'s samples (its class and config, saved with the guider)."""
        from_scheduler(scheduler), scheduler_prediction_type(scheduler)  # an unknown family is refused here
        return self.new(scheduler_config=json.loads(scheduler.to_json_string()))

    @cached_property
    def _path(self):
        if self.scheduler_config is None:
            raise ValueError(
                f"{type(self).__name__} does not know the scheduler of this modular pipeline (scheduler_config=None): "
                "use genkit.attach(pipe, guider) instead of pipe.update_components(guider=guider)"
            )
        scheduler = _scheduler(self.scheduler_config)
        return from_scheduler(scheduler), scheduler_prediction_type(scheduler)

    def set_state(self, step: int, num_inference_steps: int, timestep) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if step == 0 or step < self._last_step:
            self._run.reset()
        self._last_step, self._now = step, torch.as_tensor(timestep).flatten()[0].cpu()
        self._release()
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
        self._release()
        self._network = denoiser
        self._prepared += 1

        def keep(_module, args, kwargs):
            del self._calls[self._prepared - 1 :]  # one call a branch; a second one replaces it
            self._calls.append(Call(args, kwargs))

        self._handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        super().cleanup_models(denoiser)
        self._release()

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, data: list) -> GuiderOutput:
        raw = {identifier(batch): batch.noise_pred for batch in data}
        cond, uncond = raw["pred_cond"], raw.get("pred_uncond")
        path, rows = self._path, (0, len(cond))
        denoiser = CapturedDenoiser(self._network, *path, self._calls, cond, uncond, rows, self._now)  # type: ignore
        guided = self._run.evaluate(denoiser)
        self._calls = []
        return GuiderOutput(pred=guided.prediction.raw, pred_cond=cond, pred_uncond=uncond)


def _scheduler(config: dict):
    name = config["_class_name"]
    ours = {cls.__name__: cls for cls in members("genkit.schedulers", PathScheduler).values()}
    cls = ours.get(name) or getattr(diffusers, name, None)
    if cls is None:
        raise ValueError(unknown("scheduler_config['_class_name']", name, ours))
    return cls.from_config(config)
