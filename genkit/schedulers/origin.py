"""What the scheduler that a model came with means for one of genkit's."""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers
import torch

from genkit.registry import unknown

logger = logging.getLogger(__name__)

# What pipelines read of a flow's scheduler when they derive a shift from the size of the image.
DYNAMIC_SHIFT = ("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def diffusers_scheduler(name, config: Mapping[str, Any]):
    """The scheduler of Diffusers called ``name``, with these settings.

    Raises:
        ValueError: there is none.
    """
    cls = getattr(diffusers, str(name), None)
    if cls is None:
        raise ValueError(unknown("path['_class_name']", name, [n for n in dir(diffusers) if n.endswith("Scheduler")]))
    return cls.from_config({k: v for k, v in config.items() if k != "_class_name"})


def warn_of_lost_grid(scheduler, linear: bool) -> None:
    """Say once what of the original's steps ``scheduler``, a ``PathScheduler``, does not take over."""
    path = scheduler.config.path
    lost = [k for k, v in path.items() if v and k.startswith("use_") and k.endswith(("_sigmas", "_lambdas"))]
    lost += [k for k in ("shift_terminal", "invert_sigmas") if path.get(k)]
    lost = [k for k in lost if k != "use_flow_sigmas"]
    spacing = scheduler.config.get("timestep_spacing", "uniform")
    if not lost and not linear and spacing != "uniform" and not _visits_the_same(scheduler, path):
        lost = ["timestep_spacing"]
    if lost:
        settings = ", ".join(f"{k}={path[k]!r}" for k in lost)
        _warn(
            f"{type(scheduler).__name__} does not space its steps by {settings} of {path['_class_name']} but by "
            f"timestep_spacing={spacing!r} of its own; for the original's steps call set_timesteps(sigmas=...) with "
            "its sigmas, or (timesteps=...) with its timesteps, which pipelines take as an argument, too"
        )


def _visits_the_same(scheduler, path: Mapping[str, Any], steps: int = 10) -> bool:
    original = diffusers_scheduler(path["_class_name"], path)
    original.set_timesteps(steps)
    ours = scheduler.interpolant.timestep(scheduler._spaced(steps))
    # Within the rounding to trained timesteps; the original may visit others besides, in stages.
    gaps = (ours[:, None] - torch.as_tensor(original.timesteps).float().cpu()).abs().min(dim=1).values
    return bool((gaps <= 1).all())


@cache
def _warn(message: str) -> None:
    logger.warning(message)
