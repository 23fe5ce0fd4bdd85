"""Steps that are exact while the denoiser's answer stays the same: DDIM, DDPM and their annealed kin in one formula."""

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.schedulers.base import Generators, PathScheduler, StepOutput


class ExactDenoiserScheduler(PathScheduler):
    """Annealed Langevin-type reverse SDE, solved exactly for a clean sample ``D`` that is constant over the step.

    In the coordinates ``y = x / alpha``, ``kappa = sigma / alpha``, for a target whose score is ``B (D - y)/kappa^2``::

        y' = D + (y - D) r^{2m} + c sqrt[(kappa'^2 - kappa'^{4m} kappa^{2 - 4m}) / (2m - 1)] z

    with ``r = kappa'/kappa`` and ``2m = (1 + c^2) B``. With ``q = 2m - 1`` the same move of ``x``, which has a limit at
    ``alpha = 0``, is::

        x' = alpha' (1 - r^{q + 1}) D + (sigma'/sigma) r^q x + c sigma' sqrt[(1 - r^{2q}) / q] z

    where the root is ``sqrt(-2 log r)`` at ``q = 0``. The step to clean data gives ``D`` and draws nothing.

    Args:
        num_train_timesteps, shift, path, timestep_spacing: see :class:`genkit.schedulers.base.PathScheduler`.
        noise_scale: ``c >= 0``, injected noise over the forward process's: 0 is DDIM, 1 the DDPM posterior.
        exponent_sum: ``B > 0``, sum of the exponents of an annealed density or a product of densities, whose ``D`` is
            then the mean of theirs with these weights. The initial sample is ``N(0, 1/B)``.

    Raises:
        ValueError: a setting out of range; in ``set_timesteps``, a first move from ``alpha = 0`` that has no limit, or
            there a model that predicts ``epsilon``.

    Source: Skreta et al., "Feynman-Kac correctors in diffusion", arXiv 2503.02819, for the SDE; ``B = 1``: Song et al.,
    "Denoising diffusion implicit models", arXiv 2010.02502, equation 12 with ``eta = 0, 1``.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        noise_scale: float = 0.0,
        exponent_sum: float = 1.0,
        path: dict | None = None,
        timestep_spacing: str = "uniform",
    ):
        if not 0 <= noise_scale < math.inf:
            raise ValueError(f"noise_scale={noise_scale}: must be finite and at least 0")
        if not 0 < exponent_sum < math.inf:
            raise ValueError(f"exponent_sum={exponent_sum}: must be above 0 (otherwise no Gaussian is a start)")
        super().__init__()
        self.init_noise_sigma = exponent_sum**-0.5

    def _start(self, t: Tensor) -> Tensor:
        following = torch.cat((t, t.new_zeros(1)))[1]
        exact_coefficients(self.interpolant, t[0], following, self.config.noise_scale, self.config.exponent_sum)
        if self.prediction_type == "epsilon" and self.interpolant.alpha(t[0]) == 0:
            raise ValueError(
                f"the first time is {t[0].item():g}, where alpha = 0 and an epsilon model says nothing of the "
                "clean sample; start at an earlier time"
            )
        return t

    def step(
        self,
        model_output: Tensor,
        timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor]:
        """One move; ``model_output``, of the path's prediction type, and ``sample`` are ``(B, ...)``."""
        i = self._index(timestep)
        clean, keep, noise_std = exact_coefficients(
            self.interpolant, self.times[i], self.times[i + 1], self.config.noise_scale, self.config.exponent_sum
        )
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        d = self.interpolant.convert(model_output.to(x.dtype), self.prediction_type, "sample", x, self.times[i])
        x = clean * d + keep * x
        if noise_std:
            x = x + noise_std * self._noise(x, generator)
        self._step_index = i + 1
        x = x.to(sample.dtype)
        return StepOutput(prev_sample=x) if return_dict else (x,)


def exact_coefficients(
    interpolant, t: Tensor, t_next: Tensor, noise_scale: float, exponent_sum: float = 1.0
) -> tuple[float, float, float]:
    """``(a, b, s)`` of the exact step ``x' = a D + b x + s z`` from ``t`` to ``t_next``, float64 scalars.

    Raises:
        ValueError: ``alpha(t) = 0`` and ``(1 + c^2) B < 1`` (or ``= 1`` with ``c > 0``): the step from infinite
            ``kappa`` has no limit.
    """
    alpha, sigma = float(interpolant.alpha(t)), float(interpolant.sigma(t))
    alpha_next, sigma_next = float(interpolant.alpha(t_next)), float(interpolant.sigma(t_next))
    if sigma_next == 0:
        return alpha_next, 0.0, 0.0
    q = (1 + noise_scale**2) * exponent_sum - 1
    if alpha == 0 and (q < 0 or (q == 0 and noise_scale > 0)):
        raise ValueError(
            f"noise_scale={noise_scale}, exponent_sum={exponent_sum}: a step from pure noise (alpha = 0) needs "
            "(1 + noise_scale^2) exponent_sum > 1; start at an earlier time, or raise noise_scale"
        )
    # The ratio itself, not its logarithm, says 0 where alpha = 0.
    r = sigma_next * alpha / (sigma * alpha_next)
    if q == 0:
        spread = -2 * math.log(r) if noise_scale else 0.0
    else:
        spread = -math.expm1(2 * q * math.log(r)) / q if r else 1 / q
    return alpha_next * (1 - r ** (q + 1)), sigma_next / sigma * r**q, noise_scale * sigma_next * math.sqrt(spread)
