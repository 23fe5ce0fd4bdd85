"""What methods that make trajectories first-order share: their error, and the schedulers that their students need."""

import inspect
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from genkit.interpolants import DiscreteVP, Linear, from_scheduler
from genkit.schedulers.exact_denoiser import ExactDenoiserScheduler
from genkit.training.parts.losses import mean_of_squares, pseudo_huber


def error(residual: Tensor, huber_c: float | None) -> Tensor:
    """Squares or pseudo-Huber of every element, their mean over dimensions: ``(B, ...)`` to ``(B,)``."""
    if huber_c is None:
        return mean_of_squares(residual)
    return pseudo_huber(residual, huber_c).flatten(1).mean(1)


def first_order_scheduler(scheduler: Any) -> Any:
    """Steps that are exact while the prediction stays the same, at the times ``1 - k/N`` of the path of ``scheduler``.

    On a discrete diffusion's path that is Diffusers' DDIM with trailing spacing, which starts one step at the last
    timestep (``leading`` and ``linspace`` would take pure noise for nearly clean data), and with a last step to clean
    data. On the linear path, Euler steps, without the shift of the original.
    """
    path = from_scheduler(scheduler)
    if isinstance(path, DiscreteVP):
        known = set(inspect.signature(DDIMScheduler.__init__).parameters) - {"self"}
        config = {k: v for k, v in (scheduler.config.get("path") or scheduler.config).items() if k in known}
        config = {"clip_sample": False} | config | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
        return DDIMScheduler(**config)
    if isinstance(path, Linear):
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(path.num_train_timesteps))
    return ExactDenoiserScheduler.from_scheduler(scheduler, timestep_spacing="uniform")
