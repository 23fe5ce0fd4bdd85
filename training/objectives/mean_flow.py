"""MeanFlow: regress the average velocity between two times, so that one call jumps from noise to data."""

from pydantic import Field, model_validator

from genkit.denoisers.base import Denoiser, FlowMap
from genkit.training.objectives._average_velocity import AverageVelocity, AverageVelocityConfig, check_mix, guided
from genkit.training.objectives.base import drop_condition


class MeanFlowConfig(AverageVelocityConfig):
    """Settings of :class:`MeanFlow`.

    ``guidance_scale``: guidance that is trained into the student, 1 for none. ``guidance_mix``: how much of the
    student's own velocity its target holds, the paper's ``kappa``; the paper's ``omega`` is ``guidance_scale (1 -
    guidance_mix)``. ``guidance_interval``: times at which the target is guided and mixed.
    """

    guidance_scale: float = Field(1.0, ge=0)
    guidance_mix: float = Field(0.0, ge=0, lt=1)
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    @model_validator(mode="after")
    def _interval(self):
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance_interval={self.guidance_interval} must be [low, high] with 0 <= low < high <= 1"
            )
        if self.guidance_scale == 1 and self.guidance_mix == 0 and "guidance_interval" in self.model_fields_set:
            raise ValueError(
                f"guidance_interval={self.guidance_interval} has no effect with guidance_scale=1 and guidance_mix=0"
            )
        return self


class MeanFlow(AverageVelocity):
    """``E r / sg(r + c)^p``, ``r = |u(x_t,t,s) - sg[v - (t - s) du/dt]|^2``, ``du/dt`` in direction ``(v, 1)``.

    ``v = alpha' x0 + sigma' eps`` of the data, with ``omega``, ``kappa`` and the interval of the paper mixed with the
    student's own velocities (see :func:`genkit.training.parts.mean_velocity.guided_target`), or the guided velocity of
    a teacher. Items whose condition was dropped keep the plain ``v``, so that the unconditional branch stays unguided.
    Any path and prediction type. Logged are the errors before weighting, since with ``weight_power = 1`` the loss is
    near 1 whatever happens, and the root mean square norm of ``du/dt``.

    Raises:
        ValueError: ``guidance_mix`` with a teacher, which is guided itself.

    Source: Geng et al., "Mean flows for one-step generative modeling", arXiv 2505.13447.
    """

    Config = MeanFlowConfig

    def __init__(self, config: MeanFlowConfig, student: FlowMap, teacher: Denoiser | None = None):
        super().__init__(config, student, teacher)
        check_mix(config.guidance_mix, teacher)

    def _target(self, batch, rng, x, t, s, v):
        c = self.config
        condition, dropped = drop_condition(batch, rng, c.condition_dropout)
        low, high = c.guidance_interval
        plain = dropped | (t < low) | (t > high)
        return condition, guided(self, x, t, condition, v, c.guidance_scale, c.guidance_mix, plain)
