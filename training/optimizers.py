"""Optimisers by name, from torch and from pytorch-optimizer, and learning-rate schedules from Diffusers."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import nn
from torch.optim import Optimizer

from genkit.registry import unknown

# That hold the full rate for a while before it falls.
HOLDING = ("hold_linear", "hold_cosine")
# And Diffusers' schedules without those that need a rule of their own.
LR_SCHEDULERS = (*(s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT), *HOLDING)


def _torch() -> dict[str, type[Optimizer]]:
    found = {k: v for k, v in vars(torch.optim).items() if isinstance(v, type) and issubclass(v, Optimizer)}
    found.pop("Optimizer", None)
    return found


def _find(name: str) -> type[Optimizer]:
    if name in _torch():
        return _torch()[name]
    try:
        import pytorch_optimizer
    except ImportError:
        hint = " More come with: pip install pytorch-optimizer."
        raise ValueError(unknown("optimizer.name", name, _torch()) + hint) from None
    if name.lower() not in (extra := pytorch_optimizer.get_supported_optimizers()):
        raise ValueError(unknown("optimizer.name", name, [*_torch(), *extra]))
    return pytorch_optimizer.load_optimizer(name.lower())


def check(settings) -> type[Optimizer]:
    """The class that ``settings`` (``name`` and arguments) name, once its arguments are known to exist.

    Names are torch's class names, then pytorch-optimizer's.

    Raises:
        ValueError: an unknown optimiser or argument.
    """
    cls = _find(settings.name)
    parameters = inspect.signature(cls).parameters
    accepted = [n for n, p in parameters.items() if n != "params" and p.kind is not inspect.Parameter.VAR_KEYWORD]
    for key in settings.settings:
        if key not in accepted:
            raise ValueError(unknown("unknown key in optimizer: key", key, accepted))
    return cls


def make_optimizer(settings, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """The optimiser of ``settings`` over ``parameters``.

    Raises:
        ValueError: a value that the optimiser refuses.
    """
    cls = check(settings)
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.settings.items()}
    try:
        return cls(parameters, **values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"optimizer={settings.name} with {values}: {error}") from None


def lr_factor(
    name: str, warmup: int, steps: int, final_ratio: float, hold_ratio: float | None = None
) -> Callable[[int], float]:
    """What the learning rate is multiplied by at a step: Diffusers' schedule ``name``, a pure function.

    After the warm-up it is squeezed so as to end at ``final_ratio`` instead of 0. Under ``hold_linear`` and
    ``hold_cosine`` it warms up from 0.005, is held for ``hold_ratio`` (0.3) of the steps that are left, and then falls,
    to ``final_ratio`` at the last step.

    Source of those: Chang et al., "Scalable training for vector-quantized networks with 100% codebook utilization",
    arXiv 2509.10140 ("learning annealing").
    """
    if name in HOLDING:
        hold = 0.3 if hold_ratio is None else hold_ratio
        return lambda step: _held(step, name, warmup, steps, final_ratio, hold)
    anything = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = get_scheduler(name, anything, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]
    return lambda step: factor(step) if step < warmup else final_ratio + (1 - final_ratio) * factor(step)


def _held(step: int, name: str, warmup: int, steps: int, final_ratio: float, hold_ratio: float) -> float:
    if step < warmup:
        return 0.005 + 0.995 * step / warmup
    u = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    if u < hold_ratio:
        return 1.0
    fallen = (u - hold_ratio) / (1 - hold_ratio)
    left = 1 - fallen if name == "hold_linear" else (1 + math.cos(math.pi * fallen)) / 2
    return final_ratio + (1 - final_ratio) * left
