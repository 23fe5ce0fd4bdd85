"""What the scheduler that a model came with means for one of genkit's."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor

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


def warn_of_lost_grid(name: str, config: Mapping[str, Any], visited: Callable[[int], Tensor] | None) -> None:
    """Say once what of the original's steps a ``PathScheduler`` made from it does not take over.

    Args:
        name, config: its class and settings.
        visited: its native timesteps for a number of steps, where they ought to be the original's.
    """
    path = config["path"]
    lost = [k for k, v in path.items() if v and k.startswith("use_") and k.endswith(("_sigmas", "_lambdas"))]
    lost += [k for k in ("shift_terminal", "invert_sigmas") if path.get(k)]
    lost = [k for k in lost if k != "use_flow_sigmas"]
    spacing = config.get("timestep_spacing", "uniform")
    if not lost and visited is not None and spacing != "uniform":
        ours = visited(min(10, config["num_train_timesteps"]))
        lost = [] if _visits_the_same(ours, path) else ["timestep_spacing"]
    if lost:
        settings = ", ".join(f"{k}={path[k]!r}" for k in lost)
        _warn(
            f"{name} does not space its steps by {settings} of {path['_class_name']} but by "
            f"timestep_spacing={spacing!r} of its own; for the original's steps call set_timesteps(sigmas=...) with "
            "its sigmas, or (timesteps=...) with its timesteps, which pipelines take as an argument, too"
        )


def _visits_the_same(ours: Tensor, path: Mapping[str, Any]) -> bool:
    original = diffusers_scheduler(path["_class_name"], path)
    original.set_timesteps(len(ours))
    # Within the rounding to trained timesteps; the original may visit others besides, in stages.
    gaps = (ours[:, None] - torch.as_tensor(original.timesteps).float().cpu()).abs().min(dim=1).values
    return bool((gaps <= 1).all())


@cache
def _warn(message: str) -> None:
    logger.warning(message)
