"""What students are taught from: a network's velocity under guidance."""

import torch
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser
from genkit.interpolants import expand


@torch.no_grad()
def guided_velocity(
    denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition, guidance_scale: float | Tensor = 1.0
) -> Tensor:
    """``v_n + w (v_c - v_n)``: the flow of ``denoiser`` under classifier-free guidance, in float32 at least.

    Conversions between predictions are affine, so this is guidance in whatever the network predicts. Scale 1, and a
    batch without condition, cost one call.

    Args:
        x, t: ``(B, ...)`` and ``(B,)``.
        guidance_scale: ``w`` in Diffusers' convention, one for all or ``(B,)``.
    """
    if not condition.values or (not isinstance(guidance_scale, Tensor) and guidance_scale == 1):
        return denoiser(x, t, condition).velocity
    cond, null = denoiser.many(x, t, [condition, condition.null()])
    w = guidance_scale if not isinstance(guidance_scale, Tensor) else expand(guidance_scale, cond.velocity)
    return null.velocity + w * (cond.velocity - null.velocity)
