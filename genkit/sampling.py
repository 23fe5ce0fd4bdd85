"""THE sampling loop. Every diffusion pipeline of the toolkit draws its samples here."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from genkit.denoisers.base import Condition, Denoiser, FlowMap, Prediction
from genkit.guidance.base import Guided, Guider, Point
from genkit.guidance.moves import check_moves, moved_sample, remembered
from genkit.interpolants import Linear, from_scheduler, scheduler_prediction_type

if TYPE_CHECKING:  # the methods of that package know the loop
    from genkit.feynman_kac.log_weights import LogWeights


@dataclass(frozen=True)
class State:
    """A batch of samples at one point of the loop.

    ``i`` numbers the evaluations from 0; ``t`` and ``t_next`` are times in [0, 1] (float64 scalars), ``timestep`` the
    scheduler's own name of ``t``; ``x`` is ``(B, ...)``; ``guided`` holds the predictions made at ``t``;
    ``log_weights`` are those of the samples where they are weighted particles, in groups that follow each other.
    """

    i: int
    t: Tensor
    t_next: Tensor
    timestep: Tensor
    x: Tensor
    guided: Guided
    guider_state: Any
    scheduler: Any
    generators: Sequence[torch.Generator] | torch.Generator | None = None
    log_weights: "LogWeights | None" = None

    def gather(self, index: Tensor) -> "State":
        """The state with sample ``index[j]`` at row ``j``: everything kept per sample is re-indexed together.

        Raises:
            ValueError: the scheduler remembers earlier steps and cannot re-index them, or a group of particles would
                mix prompts.
        """
        if hasattr(self.scheduler, "gather"):
            self.scheduler.gather(index)
        else:
            held = remembered(self.scheduler)
            if held:
                raise ValueError(
                    f"scheduler={type(self.scheduler).__name__} remembers earlier steps ({', '.join(held)}) and cannot "
                    "re-index them; use one without history, such as FlowMatchEulerDiscreteScheduler or DDIMScheduler"
                )
        generators = self.generators
        if isinstance(generators, Sequence):
            generators = [generators[j] for j in index.tolist()]
        guided = replace(
            self.guided,
            prediction=self.guided.prediction.index(index),
            parts={name: part.index(index) for name, part in self.guided.parts.items()},
            z=None if self.guided.z is None else self.guided.z[index],
        )
        return replace(
            self,
            x=self.x[index],
            guided=guided,
            guider_state=None if self.guider_state is None else self.guider_state.gather(index),
            generators=generators,
            log_weights=None if self.log_weights is None else self.log_weights.gather(index),
        )


class Particles(Protocol):
    """What turns a batch of independent samples into weighted, interacting ones."""

    def start_run(self, denoiser: Denoiser, scheduler, x: Tensor, condition: Condition, guider: Guider | None) -> None:
        """Refuse a run that cannot work, before the first network call, and forget the last one."""
        ...

    def after_evaluation(self, state: State) -> State:
        """Weigh, and resample samples and their cached predictions together."""
        ...


@torch.no_grad()
def trajectory(
    denoiser: Denoiser,
    scheduler,
    x: Tensor,
    condition: Condition | None = None,
    *,
    guider: Guider | None = None,
    particles: Particles | None = None,
    callback: Callable[[State], State] | None = None,
    generators: Sequence[torch.Generator] | torch.Generator | None = None,
    progress: bool = False,
    **step_kwargs,
) -> Iterator[State]:
    """Walk ``scheduler.timesteps`` from noise ``x`` and yield the state after every step; stop by not asking further.

    Args:
        denoiser: the network; under a scheduler that names jump targets it must be a flow map.
        scheduler: a Diffusers scheduler on which ``set_timesteps`` has been called.
        x: ``(B, ...)``, standard normal times ``scheduler.init_noise_sigma``. Its dtype is kept to the end, whatever
            the network's.
        condition: what to generate; its unconditional branch is what guiders use.
        guider: rule that combines predictions; ``None`` follows the conditional one.
        particles: weighs and resamples between evaluation and step.
        callback: sees, and may replace, the state after every step.
        generators: one a sample, so that a sample does not depend on its neighbours, or one for all.
        progress: show a bar.
        step_kwargs: passed to ``scheduler.step`` (``eta`` ...).

    Raises:
        ValueError: denoiser and scheduler do not fit, a guider on a flow map, a guider that lacks something or that
            moves samples under a scheduler that remembers them.
    """
    condition = condition or Condition()
    is_map = check_fit(denoiser, scheduler, guider)
    if guider is not None:
        guider.check(tuple(x.shape), condition)
        guider.check_network(
            denoiser.network, denoiser.interpolant, denoiser.prediction_type, tuple(x.shape), condition
        )
        guider.start_run()
    if particles is not None:
        particles.start_run(denoiser, scheduler, x, condition, guider)
    expected = scheduler_prediction_type(scheduler)
    timesteps = scheduler.timesteps
    times = visited_times(denoiser, scheduler)
    accepted = inspect.signature(scheduler.step).parameters
    unknown_kwargs = set(step_kwargs) - set(accepted)
    if unknown_kwargs:
        raise ValueError(
            f"{type(scheduler).__name__}.step takes no {sorted(unknown_kwargs)}; it takes {list(accepted)}"
        )
    guider_state, log_weights = None, None
    for i, timestep in enumerate(tqdm(timesteps, disable=not progress, leave=False)):
        t, t_next = times[i], times[i + 1]
        z = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        if is_map:
            guided = _jump(denoiser, z, t, scheduler.jump_target(timestep), condition)  # type: ignore[arg-type]
        elif guider is None:
            prediction = denoiser(z, t, condition, timestep=timestep)
            guided = Guided(prediction, {"cond": prediction})
        else:
            point = Point(denoiser, z, t, t_next, timestep, condition)
            guided, guider_state = guider.evaluate(point, guider_state)
            if guided.z is not None:
                x = moved_sample(scheduler, x, guided.z - z, timestep)
        state = State(i, t, t_next, timestep, x, guided, guider_state, scheduler, generators, log_weights)
        if particles is not None:
            state = particles.after_evaluation(state)
        output = state.guided.prediction.raw if is_map else state.guided.prediction.as_type(expected)
        kwargs = dict(step_kwargs)
        if "generator" in accepted and state.generators is not None:
            kwargs["generator"] = state.generators
        # Diffusers' schedulers answer in the dtype of the prediction: a half-precision network would round the sample.
        output = output.to(torch.promote_types(output.dtype, state.x.dtype))
        x = scheduler.step(output, timestep, state.x, **kwargs, return_dict=False)[0].to(state.x.dtype)
        state = replace(state, x=x)
        if callback is not None:
            state = callback(state)
        x, guider_state, generators, log_weights = (
            state.x,
            state.guider_state,
            state.generators,
            state.log_weights,
        )
        yield state


def set_timesteps(scheduler, num_inference_steps: int, device: torch.device | str | None = None) -> None:
    """``scheduler.set_timesteps``, on the linear path at times ``1 - k/N`` that the scheduler then shifts.

    Flow-matching schedulers left alone spend their last step on the stretch from ``t = 0.001`` to 0. A student's own
    times (``trained_times`` of the scheduler) are kept.

    Raises:
        ValueError: fewer steps than one, or more than the student knows.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    own = scheduler.config.get("trained_times")
    if takes_sigmas and not own and isinstance(from_scheduler(scheduler), Linear):
        sigmas = [1 - k / num_inference_steps for k in range(num_inference_steps)]
        scheduler.set_timesteps(sigmas=sigmas, device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)


def visited_times(denoiser: Denoiser, scheduler) -> Tensor:
    """Time of every evaluation of a run, and 0 for its end: float64 ``(evaluations + 1,)``."""
    # They stay on the CPU: coefficients are computed there and no step waits for the device.
    times = getattr(scheduler, "times", None)
    if times is None:
        times = torch.cat((denoiser.interpolant.time(scheduler.timesteps.cpu()), torch.zeros(1, dtype=torch.float64)))
    return times


def sample(denoiser: Denoiser, scheduler, x: Tensor, condition: Condition | None = None, **kwargs) -> Tensor:
    """The last sample of :func:`trajectory`, which takes the same arguments."""
    for state in trajectory(denoiser, scheduler, x, condition, **kwargs):
        x = state.x
    return x


def check_fit(denoiser: Denoiser, scheduler, guider: Guider | None = None) -> bool:
    """Whether the loop makes jumps (a flow map under a scheduler of jumps); raises where the parts do not fit."""
    jumps = hasattr(scheduler, "jump_target")
    if jumps and not isinstance(denoiser, FlowMap):
        raise ValueError(
            f"scheduler={type(scheduler).__name__} jumps between two times, but denoiser={type(denoiser).__name__} "
            "knows one; use a flow map (genkit.denoisers.TwoTime or a two-time network)"
        )
    if jumps and guider is not None:
        raise ValueError(
            f"guider={type(guider).__name__}: off its diagonal a flow map gives no clean-sample prediction to guide; "
            "train it with guidance (guidance_scale of the objective), or sample it with a one-time scheduler"
        )
    path = from_scheduler(scheduler)
    if not path.same_as(denoiser.interpolant):
        raise ValueError(
            f"scheduler={type(scheduler).__name__} walks the path {type(path).__name__}, but the denoiser was made for "
            f"{type(denoiser.interpolant).__name__}, or for other alphas and sigmas of this name"
        )
    if guider is not None:
        check_moves(guider, scheduler)
    return jumps


def _jump(denoiser: FlowMap, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Guided:
    denoiser.calls += 1
    start, end = (torch.as_tensor(v, device=x.device).expand(len(x)).contiguous() for v in (t, s))
    u = denoiser.average_velocity(x, start, end, condition)
    prediction = Prediction(u, "flow_prediction", denoiser.interpolant, x, t)
    return Guided(prediction, {"cond": prediction})
