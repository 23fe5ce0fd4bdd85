"""Guiders that move the sample before a step, and schedulers whose memory of earlier samples forbids it.

genkit's schedulers are asked what they keep (``remembered()``) and whether it involves samples (``remembers_samples``);
of others the usual names are known.
"""

import torch
from torch import Tensor

# Where Diffusers' multistep and multistage schedulers keep what they remember of earlier steps, per sample.
_HISTORY = (
    "ets",
    "model_outputs",
    "derivatives",
    "prev_derivative",
    "dt",
    "sample",
    "cur_sample",
    "last_sample",
    "noise",
)


def remembered(scheduler) -> list[str]:
    """Names of the attributes in which ``scheduler`` holds something of earlier steps now."""
    if hasattr(scheduler, "remembered"):
        return scheduler.remembered()
    return [name for name in _HISTORY if _holds_tensor(getattr(scheduler, name, None))]


def keeps_history(scheduler) -> bool:
    """Whether ``scheduler`` has a place for something of earlier steps, empty or not, as far as shows before a run."""
    return any(hasattr(scheduler, name) for name in _HISTORY) or getattr(scheduler, "order", 1) > 1


def check_moves(guider, scheduler) -> None:
    """Refuse a scheduler whose memory of earlier samples would be of samples that ``guider`` has moved since.

    Raises:
        ValueError: such a scheduler.
    """
    if guider.moves_sample and (hasattr(scheduler, "gather") or keeps_history(scheduler)):
        _refuse_samples_kept(scheduler, f"guider={type(guider).__name__}")


def _refuse_samples_kept(scheduler, mover: str) -> None:
    if getattr(scheduler, "remembers_samples", True):
        raise ValueError(
            f"{mover} moves the sample before each step, and scheduler={type(scheduler).__name__} remembers earlier "
            "ones; use one of first order without history, such as FlowMatchEulerDiscreteScheduler, "
            "EulerDiscreteScheduler or DDIMScheduler"
        )


def moved_sample(scheduler, x: Tensor, move: Tensor, timestep) -> Tensor:
    """The scheduler's sample ``x`` after the network's input, which may be a scaled ``x``, has moved by ``move``.

    Raises:
        ValueError: a scheduler of genkit that turned out to keep samples of earlier steps.
    """
    if hasattr(scheduler, "remembered") and scheduler.remembered():
        _refuse_samples_kept(scheduler, "the guider")
    if hasattr(scheduler, "scale_model_input"):
        move = move / scheduler.scale_model_input(torch.ones(1, device=x.device, dtype=move.dtype), timestep)
    return (x + move).to(x.dtype)


def _holds_tensor(value) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0
    return isinstance(value, (list, tuple)) and any(_holds_tensor(v) for v in value)
