"""``with guided(pipe, guider):`` a guider inside a classic Diffusers pipeline, which knows nothing of guiders."""

import functools
import inspect
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from genkit.denoisers.network import from_pipeline
from genkit.guidance.base import Guider
from genkit.guidance.captured import Call, CapturedDenoiser, Run, first_output
from genkit.guidance.moves import check_moves, moved_sample

# How a pipeline evaluates the two branches, by its class or a base class of it. Everything else is refused: a wrong
# guess of the order would guide away from the prompt without any sign of it.
_DOUBLED = r"StableDiffusion(XL|3)?(Adapter|ControlNet(Union)?)?(Img2Img|Inpaint(ing)?)?Pipeline"  # [uncond; cond]
_DOUBLED_COND_FIRST = r"DiTPipeline"  # [cond; uncond]
_SEQUENTIAL = r"Flux(ControlNet)?(Img2Img|Inpaint)?Pipeline"  # cond, then uncond
_THREE_WAY = r"PAG|InstructPix2Pix|LEdits"
_MARK = "_genkit_guided"


@contextmanager
def guided(pipe, guider: Guider) -> Iterator[Run]:
    """Inside the block ``pipe`` follows ``guider`` wherever it would apply its own classifier-free guidance.

    The pipeline must run with guidance (``guidance_scale > 1``; Flux: ``true_cfg_scale > 1`` and a negative prompt), so
    that it evaluates both branches; the size of its own scale is then without effect. Works for Stable Diffusion 1, 2,
    XL and 3 with ControlNets, adapters, image-to-image and inpainting, for Flux with true CFG and for DiT; under
    ``torch.compile``, offloading and LoRA. Afterwards the pipeline is what it was, whatever happened inside::

        with guided(pipe, APG(guidance_scale=10)):
            images = pipe("a cat", guidance_scale=5).images

    Args:
        pipe: a classic Diffusers pipeline.
        guider: the rule. Its state starts anew with every call of the pipeline.

    Yields:
        :class:`Run`, whose ``guided`` and ``state`` are those of the last evaluation (for ``callback_on_step_end``).

    Raises:
        ValueError: not a genkit guider; a pipeline that is not supported, a scheduler that does not fit the network, a
            network compiled in place, a guider that moves samples under a scheduler that remembers them; later, from
            within the call but before the network's first: no guidance in the pipeline, or what :meth:`Guider.check`
            refuses.
    """
    if not isinstance(guider, Guider):
        raise ValueError(f"guider={type(guider).__name__}: accepted is a genkit guider, see genkit.guidance")
    family = _family(pipe)
    hook = (_Sequential if family == _SEQUENTIAL else _Doubled)(pipe, guider, family)
    check_moves(guider, hook.scheduler)
    handles = [
        hook.network.register_forward_pre_hook(hook.before, with_kwargs=True),
        hook.network.register_forward_hook(hook, with_kwargs=True),
    ]
    try:
        with _around(hook.scheduler, "set_timesteps", hook.restart), _around(hook.scheduler, "step", hook.step):
            yield hook.run
    finally:
        for handle in handles:
            handle.remove()


def _family(pipe) -> str:
    names = [c.__name__ for c in type(pipe).__mro__]
    for family in (_DOUBLED, _DOUBLED_COND_FIRST, _SEQUENTIAL):
        if any(re.fullmatch(family, name) for name in names):
            return family
    if hasattr(pipe, "blocks") or any(name == "ModularPipeline" for name in names):
        raise ValueError(f"pipe={names[0]} is a modular pipeline: use genkit.attach(pipe, guider)")
    if re.search(_THREE_WAY, names[0]):
        raise ValueError(
            f"pipe={names[0]} combines three predictions by a formula of its own, which a guider replaces only for two"
        )
    raise ValueError(
        f"pipe={names[0]} is not a pipeline whose order of branches is known; accepted are those named like "
        f"{_DOUBLED}, {_DOUBLED_COND_FIRST} or {_SEQUENTIAL}, and their subclasses"
    )


@contextmanager
def _around(scheduler, method: str, action) -> Iterator[None]:
    """Make ``scheduler.method(...)`` be ``action(method, ...)``; on the instance, which is left as it was."""
    original = getattr(scheduler, method)
    if getattr(original, _MARK, False):
        raise ValueError("the pipeline (or its scheduler) is in another `guided` block already; leave that one first")
    shadowed = vars(scheduler).get(method)

    @functools.wraps(original)  # pipelines look at the signature
    def wrapper(*args, **kwargs):
        return action(original, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    setattr(scheduler, method, wrapper)
    try:
        yield
    finally:
        if shadowed is None:
            delattr(scheduler, method)
        else:
            setattr(scheduler, method, shadowed)


class _Hook(ABC):
    """What the two ways of evaluating branches share. As a forward hook it returns the output to use instead."""

    def __init__(self, pipe, guider: Guider, family: str):
        reference = from_pipeline(pipe)
        self.pipe, self.scheduler, self.family = pipe, pipe.scheduler, family
        self.network = reference.network
        self.path = reference.interpolant, reference.prediction_type
        if getattr(self.network, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{type(self.network).__name__} is compiled in place (network.compile()), which hides its hooks; use "
                "network.compile_repeated_blocks() or pipe.unet = torch.compile(pipe.unet) instead"
            )
        self.run = Run(guider)
        self._busy = False
        self.reset()

    def reset(self) -> None:
        self.run.reset()
        self._checked = False

    def restart(self, set_timesteps, *args, **kwargs):
        """Around the scheduler's ``set_timesteps``: a run begins."""
        self.reset()
        return set_timesteps(*args, **kwargs)

    def step(self, step, *args, **kwargs):
        """Around the scheduler's ``step``: it starts from where the guider moved the sample."""
        self.check_answered()
        guided, point = self.run.guided, self.run.point
        if guided is not None and guided.z is not None and point is not None:
            bound = inspect.signature(step).bind(*args, **kwargs)
            sample, timestep = bound.arguments["sample"], bound.arguments["timestep"]
            bound.arguments["sample"] = moved_sample(self.scheduler, sample, guided.z - point.z, timestep)
            args, kwargs = bound.args, bound.kwargs
        return step(*args, **kwargs)

    @abstractmethod
    def check_answered(self) -> None:
        """Called before the scheduler's step."""

    def before(self, module, args, kwargs) -> None:
        """Called before the network: whatever cannot work is refused here."""
        if self._busy:  # a guider asks the network again
            return
        if self.pipe.scheduler is not self.scheduler:
            raise ValueError("pipe.scheduler was replaced inside the `guided` block; replace it before")
        if "skip_layers" in kwargs:
            raise ValueError("skip_guidance_layers adds a third prediction; leave it out inside `guided`")
        batch = self.check(Call(args, kwargs))
        if not self._checked:
            shape = Call(args, kwargs).shape(self.network, batch)
            self.run.guider.check(shape)
            self.run.guider.check_network(self.network, *self.path, shape)
            self._checked = True

    @abstractmethod
    def check(self, call: Call) -> int:
        """The number of samples, after a check that the pipeline makes both predictions."""

    def __call__(self, module, args, kwargs, output):
        return None if self._busy else self.answer(Call(args, kwargs), output)

    @abstractmethod
    def answer(self, call: Call, output):
        """The output to use in place of ``output`` of ``call``."""

    def guide(self, calls: list[Call], cond: Tensor, uncond: Tensor, rows: tuple[int, int]) -> Tensor:
        """The raw guided prediction, ``(B, ...)``, of the shape of the sample."""
        timestep, t_next = self._times(calls[0].time)
        denoiser = CapturedDenoiser(self.network, *self.path, calls, cond, uncond, rows, timestep)
        self._busy = True
        try:
            return self.run.evaluate(denoiser, t_next).prediction.raw
        finally:
            self._busy = False

    def _times(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """The scheduler's timestep that the network was given (perhaps divided and rounded), and the next time."""
        interpolant = self.path[0]
        timesteps = self.scheduler.timesteps.detach().cpu().double()
        value = float(given.flatten()[0])
        candidates = torch.tensor([value, value * getattr(interpolant, "num_train_timesteps", 1)], dtype=torch.float64)
        error = (timesteps[None] - candidates[:, None]).abs()
        if error.min() > 1e-2 * timesteps.abs().max():
            raise ValueError(f"the network was given timestep={value:g}, which is none of its scheduler's timesteps")
        timestep = timesteps[error.min(dim=0).values.argmin()]
        times = interpolant.time(timesteps)
        later = times[times < interpolant.time(timestep)]
        return timestep, later.max() if len(later) else torch.zeros((), dtype=torch.float64)


class _Doubled(_Hook):
    """One call on ``[uncond; cond]``: the guided prediction twice makes ``u + w (c - u)`` give it back exactly."""

    def check_answered(self) -> None:
        """Both branches come in one call: nothing can be missing."""

    def check(self, call):
        batch, rest = divmod(len(call.input), 2)
        scale = getattr(self.pipe, "guidance_scale", None)
        doubled = rest == 0 and torch.equal(call.input[:batch, :1], call.input[batch:, :1])
        if not getattr(self.pipe, "do_classifier_free_guidance", True) or not doubled:
            raise ValueError(
                f"{type(self.pipe).__name__} runs without classifier-free guidance"
                + (f" (guidance_scale={scale})" if scale is not None else "")
                + ", so there is no unconditional prediction to guide by; pass guidance_scale > 1 (its size has no "
                "effect inside `guided`)"
            )
        return batch

    def answer(self, call, output):
        raw = first_output(output)
        batch = len(raw) // 2
        first, second = raw[:batch], raw[batch:]
        if self.family == _DOUBLED_COND_FIRST:
            guided = self.guide([call], first, second, (0, batch))
        else:
            guided = self.guide([call], second, first, (batch, 0))
        answer = raw.clone()
        answer[tuple(map(slice, (len(raw), *guided.shape[1:])))] = torch.cat((guided, guided))
        return _with_first(output, answer)


class _Sequential(_Hook):
    """Conditional call, then unconditional call. The conditional output is overwritten in place when the second one is
    known, so that ``n + s (p - n)`` gives the guided prediction exactly whatever ``s`` is."""

    def __init__(self, pipe, guider, family):
        if "true_cfg_scale" not in inspect.signature(type(pipe).__call__).parameters:
            raise ValueError(
                f"pipe={type(pipe).__name__} has no true_cfg_scale, so it never makes an unconditional prediction"
            )
        super().__init__(pipe, guider, family)

    def reset(self):
        super().reset()
        self._pending: tuple[Call, Tensor] | None = None

    def check(self, call):
        # The pipeline keeps to itself whether it will make the second call; its own frame knows.
        frame: FrameType | None = sys._getframe()
        while frame is not None and "do_true_cfg" not in frame.f_locals:
            frame = frame.f_back
        if frame is not None and not frame.f_locals["do_true_cfg"]:
            self._refuse()
        return len(call.input)

    def check_answered(self):
        if self._pending is not None:
            self._pending = None
            self._refuse()

    def _refuse(self):
        raise ValueError(
            f"{type(self.pipe).__name__} runs without true classifier-free guidance, so there is no unconditional "
            "prediction to guide by; pass true_cfg_scale > 1 and negative_prompt='' (its size has no effect inside "
            "`guided`)"
        )

    def answer(self, call, output):
        if self._pending is None:
            cond = first_output(output).clone()
            self._pending = call, cond
            return _with_first(output, cond)
        (cond_call, cond), self._pending = self._pending, None
        guided = self.guide([cond_call, call], cond.clone(), first_output(output), (0, len(cond)))
        cond.copy_(guided)
        return _with_first(output, guided.clone())


def _with_first(output, tensor: Tensor):
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    return type(output)(**{**output, next(iter(output)): tensor})
