"""Classifier-free guidance."""

from diffusers.configuration_utils import register_to_config

from genkit.guidance import arithmetic
from genkit.guidance.base import Guider, check_range


class CFG(Guider):
    """Classifier-free guidance: extrapolate from the unconditional through the conditional prediction.

    With ``c``, ``u`` the two raw predictions, ``w`` the scale and ``phi`` the rescale::

        g = u + w (c - u)
        g <- g + phi (g std(c) / std(g) - g)        (std per sample)

    The first line is the same in every parametrisation. Source: Ho and Salimans, "Classifier-free diffusion guidance",
    arXiv 2207.12598; rescaling: Lin et al., "Common diffusion noise schedules and sample steps are flawed",
    arXiv 2305.08891, section 3.4.

    Args:
        guidance_scale: ``w >= 0``; 1 follows the conditional prediction, 0 the unconditional one.
        guidance_rescale: ``phi`` in ``[0, 1]``.
        start, stop, enabled, scheduler_config: see :class:`Guider`.

    Raises:
        ValueError: a value outside its range.
    """

    @register_to_config
    def __init__(
        self,
        *,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scheduler_config: dict | None = None,
    ):
        check_range("guidance_scale", guidance_scale, 0)
        check_range("guidance_rescale", guidance_rescale, 0, 1)
        super().__init__(start=start, stop=stop, enabled=enabled, scheduler_config=scheduler_config)
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale

    def combine(self, parts, state):
        cond = parts["cond"]
        guided = arithmetic.cfg(cond.raw, parts["uncond"].raw, self.guidance_scale, self.guidance_rescale or None)
        return cond.with_raw(guided), state
