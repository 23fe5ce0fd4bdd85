"""Sampling that can be differentiated: THE rollout of every method that learns from a reward of its own samples."""

import copy
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genkit.denoisers.base import Condition, Denoiser, Prediction
from genkit.guidance.moves import keeps_history
from genkit.interpolants import expand
from genkit.pipelines.classic import classic_pipeline, set_schedule
from genkit.registry import unknown
from genkit.rng import ItemRNG
from genkit.sampling import set_timesteps
from genkit.schedulers.exact_denoiser import ExactDenoiserScheduler, exact_coefficients
from genkit.training.adapters import base_network
from genkit.training.parts.losses import wide


@dataclass(frozen=True)
class Grid:
    """When the network is called: ``times`` ``(N + 1,)`` down to 0, float64, and native ``timesteps`` ``(N,)``."""

    times: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


def schedule(student: Denoiser, pipe: Any, scheduler: Any, num_steps: int, shape: tuple[int, ...], device=None) -> None:
    """``scheduler.set_timesteps`` for samples of ``shape`` ``(..., H, W)``, whose size some shifts depend on."""
    if getattr(scheduler, "config", {}).get("use_dynamic_shifting") or _shift_by_size(scheduler):
        classic = classic_pipeline(base_network(student), {**pipe.components, "scheduler": scheduler})
        set_schedule(classic, shape, num_steps, device)
    else:
        set_timesteps(scheduler, num_steps, device)


def _shift_by_size(scheduler: Any) -> bool:
    return bool((getattr(scheduler, "config", {}).get("path") or {}).get("use_dynamic_shifting"))


def walker(scheduler: Any, name: str | None = None) -> ExactDenoiserScheduler:
    """First-order steps at the times of ``scheduler``, or of the scheduler of Diffusers called ``name`` in its place.

    Raises:
        ValueError: an unknown name; a scheduler that clips or thresholds, whose gradient would be that of the clipping;
            one named that remembers earlier steps, which a truncated rollout would have to forget.
    """
    if name is not None:
        cls: Any = getattr(diffusers, name, None)
        if cls is None or not name.endswith("Scheduler"):
            known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
            raise ValueError(unknown("objective.scheduler", name, known))
        scheduler = cls.from_config(scheduler.config)
        if keeps_history(scheduler):
            raise ValueError(
                f"objective.scheduler={name!r} remembers earlier steps, which are not there where the rollout is cut; "
                "accepted are schedulers of first order, such as DDIMScheduler, EulerDiscreteScheduler or "
                "FlowMatchEulerDiscreteScheduler"
            )
    config = getattr(scheduler, "config", {})
    for setting in ("clip_sample", "thresholding"):
        if config.get(setting) or (config.get("path") or {}).get(setting):
            raise ValueError(
                f"{setting}=True of the pipeline's {type(scheduler).__name__}: clean samples that are cut pass no "
                f"gradient; save the pipeline with a scheduler whose {setting} is False"
            )
    return ExactDenoiserScheduler.from_scheduler(copy.deepcopy(scheduler))


class Rollout:
    """Samples of ``student`` on ``grid``, a call at a time; what runs under ``no_grad`` is the caller's choice.

    The prediction at a call is ``u + w (c - u)``. A step from call ``i`` to time ``j`` keeps the prediction::

        x_j = (alpha_j - alpha_i sigma_j / sigma_i) D + (sigma_j / sigma_i) x_i

    which is DDIM and, on the linear path, Euler's ``x_i + (t_j - t_i) v``, from any time to any earlier one. State is
    kept in float32 at least, whatever the network computes in. Calls and times may differ from row to row.

    Args:
        student: the network.
        grid: its calls.
        condition: of the batch.
        guidance_scale: ``w``; 1 asks the conditional branch alone.
        detach_unconditional: no gradient through ``u``, which saves its activations; else gradients reach ``c`` with
            factor ``w`` and ``u`` with ``1 - w``.
        noise_scale: 0 is DDIM; 1 the DDPM posterior, whose noise is drawn from ``rng`` at every step.
        recompute: keep no activations of a call that gradients pass, but compute it again in the backward.
        base: what the student is held to; the squared distance of their predictions at calls with gradient is summed in
            ``penalty`` ``(B,)``, a mean over elements and a sum over calls.
    """

    def __init__(
        self,
        student: Denoiser,
        grid: Grid,
        condition: Condition,
        *,
        guidance_scale: float = 1.0,
        detach_unconditional: bool = False,
        noise_scale: float = 0.0,
        recompute: bool = True,
        base: Any = None,
        rng: ItemRNG | None = None,
    ):
        self.student, self.grid, self.condition = student, grid, condition
        self.guidance_scale, self.detach_unconditional = guidance_scale, detach_unconditional
        self.noise_scale, self.recompute, self.base, self.rng = noise_scale, recompute, base, rng
        self.penalty: Tensor | None = None

    def __len__(self) -> int:
        return len(self.grid)

    def predict(self, x: Tensor, i: int | Tensor) -> Prediction:
        """The guided prediction at ``x`` ``(B, ...)`` by call ``i``, a number or one a row."""
        if self.recompute and torch.is_grad_enabled():
            # Not the reentrant form: where x is without gradient that would lose the gradient of the weights.
            raw = checkpoint(self._raw, x, i, use_reentrant=False)
        else:
            raw = self._raw(x, i)
        if self.base is not None and torch.is_grad_enabled():
            with torch.no_grad(), self.base.network() as network:
                held = self._raw(x.detach(), i, network)
            apart = wide(raw - held).square().flatten(1).mean(1)
            self.penalty = apart if self.penalty is None else self.penalty + apart
        return self.at(raw, x, i)

    def at(self, raw: Tensor, x: Tensor, i: int | Tensor) -> Prediction:
        """``raw`` as the prediction that was made at ``x`` by call ``i``."""
        return Prediction(raw, self.student.prediction_type, self.student.interpolant, x, self._times(i, x))

    def step(self, prediction: Prediction, i: int | Tensor, j: int | Tensor, *, x: Tensor | None = None) -> Tensor:
        """The sample at time ``j`` of ``0 ... N``; ``x`` is where the step begins, if not where the call was made.

        Such a step goes on with the call's velocity, whatever the network predicts.
        """
        clean, x = self._begin(prediction, x)
        path = self.student.interpolant
        t, s = self._times(i, x), self._times(j, x)
        keep = path.sigma(s) / path.sigma(t)
        return expand((path.alpha(s) - path.alpha(t) * keep).to(x), x) * clean + expand(keep.to(x), x) * x

    def walk(self, x: Tensor, first: int, last: int) -> Tensor:
        """From the state before call ``first`` to that before call ``last``, or to the clean sample at ``N``."""
        for i in range(first, last):
            x = self.advance(self.predict(x, i), i)
        return x

    def advance(self, prediction: Prediction, i: int, *, x: Tensor | None = None) -> Tensor:
        """One step of the sampler, from call ``i`` to the next time, with the noise that it injects; ``x`` as above."""
        if not self.noise_scale:
            return self.step(prediction, i, i + 1, x=x)
        clean, x = self._begin(prediction, x)
        path, times = self.student.interpolant, self.grid.times
        towards, keep, spread = exact_coefficients(path, times[i], times[i + 1], self.noise_scale)
        assert self.rng is not None
        x = towards * clean + keep * x
        return x + spread * self.rng.normal(x.shape[1:], dtype=x.dtype) if spread else x

    def _begin(self, prediction: Prediction, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """The clean sample that ``prediction`` means for a step from ``x``, and ``x``."""
        p = prediction
        if x is None:
            x = wide(p.z)
            return p.interpolant.convert(p.raw, p.prediction_type, "sample", x, p.t), x
        return p.interpolant.convert(p.velocity, "flow_prediction", "sample", x, p.t), x

    def _raw(self, x: Tensor, i: int | Tensor, student: Denoiser | None = None) -> Tensor:
        student = student or self.student
        t = self._times(i, x)
        steps = self.grid.timesteps.to(x.device)[i]
        if self.guidance_scale == 1:
            return student(x, t, self.condition, timestep=steps).raw
        if self.detach_unconditional and torch.is_grad_enabled():
            with torch.no_grad():
                u = student(x, t, self.condition.null(), timestep=steps).raw
            c = student(x, t, self.condition, timestep=steps).raw
        else:
            both = student.many(x, t, [self.condition, self.condition.null()], timestep=steps)
            c, u = both[0].raw, both[1].raw
        return u + self.guidance_scale * (c - u)

    def _times(self, i: int | Tensor, x: Tensor) -> Tensor:
        if isinstance(i, Tensor):
            return self.grid.times.to(x.device)[i]
        return self.grid.times[i]
