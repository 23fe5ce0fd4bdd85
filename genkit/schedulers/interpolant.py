"""Stochastic-interpolant sampling: the same marginals with as much injected noise as one likes."""

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.interpolants import Interpolant
from genkit.registry import unknown
from genkit.schedulers.base import Generators, PathScheduler, StepOutput
from genkit.schedulers.exact_denoiser import exact_coefficients

DIFFUSION_FORMS = ("none", "sigma", "constant", "sbdm", "linear", "decreasing", "increasing-decreasing")
INTEGRATORS = ("euler", "heun", "exact")
LAST_STEPS = ("mean", "tweedie", "euler", "none")
# Where the drift is infinite at pure noise, sampling starts this much earlier.
START_OFFSET = 1e-3


class InterpolantScheduler(PathScheduler):
    """The ODE of a stochastic interpolant, or an SDE with the same marginals for any coefficient ``w(t) >= 0``::

        dx = (v - w s) dt + sqrt(2 w) dW        backwards in t; v velocity, s = -E[eps | x] / sigma score

    =========================== ==================================================================================
    ``diffusion_form``          ``w(t)``, with ``n = diffusion_norm``
    =========================== ==================================================================================
    ``none``                    0: the probability-flow ODE, which draws nothing
    ``sigma``                   ``n sigma(t)``, regular at both ends
    ``constant``                ``n``
    ``sbdm``                    ``n (sigma sigma' - sigma^2 alpha'/alpha)``: at 1 the reverse of the noising diffusion
    ``linear``                  ``n t``
    ``decreasing``              ``(1 - n cos(pi t))^2 / 4``, greatest at pure noise
    ``increasing-decreasing``   ``n sin(pi t)^2``
    =========================== ==================================================================================

    Args:
        num_train_timesteps, shift, path: see :class:`genkit.schedulers.base.PathScheduler`.
        diffusion_form, diffusion_norm: the coefficient, above; ``n >= 0``.
        integrator: ``euler`` (Euler-Maruyama; stable while ``step w`` is below about ``sigma^2``); ``heun``: noise
            first, then Heun's rule, two calls a step, none drawn before the first call, which sees the initial sample;
            ``exact``: the step that is exact for a constant clean sample, with ``c^2 = w / w_sbdm``, for large ``w``.
        last_step: the step from the last time to clean data: ``mean`` is the integrator's without its noise,
            ``tweedie`` the denoiser ``E[x0 | x]``, ``euler`` one step of the ODE, ``none`` an ordinary step, whose
            noise stays in the sample.
        last_step_size: length of that step where ``timestep_spacing`` is ``uniform``: ``N`` evaluations are spread
            evenly between 1 and here. After the configured shift; in (0, 1). Given times are taken as they are.
        timestep_spacing: see :class:`genkit.schedulers.base.PathScheduler`.

    At ``alpha = 0``, ``sbdm`` (but in the exact integrator) and ``epsilon`` models are undefined: a first time of 1
    becomes 0.999 there. Between two data sets (``x`` starts at a sample of the one) only ``none`` applies.

    Raises:
        ValueError: a setting out of range; in ``set_timesteps``, a second time not below 0.999 where the first moved.

    Source: Albergo, Boffi, Vanden-Eijnden, "Stochastic interpolants", arXiv 2303.08797; the coefficients
    and last steps: Ma et al., "SiT", arXiv 2401.08740.
    """

    # What Heun's rule keeps between its two calls, under the names by which the sampling loop looks for history.
    sample: Tensor | None
    prev_derivative: Tensor | None

    _flow_spacing = "uniform"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        integrator: str = "euler",
        last_step: str = "mean",
        last_step_size: float = 0.04,
        path: dict | None = None,
        timestep_spacing: str = "uniform",
    ):
        for name, value, accepted in (
            ("diffusion_form", diffusion_form, DIFFUSION_FORMS),
            ("integrator", integrator, INTEGRATORS),
            ("last_step", last_step, LAST_STEPS),
        ):
            if value not in accepted:
                raise ValueError(unknown(name, value, accepted))
        if not 0 <= diffusion_norm < math.inf:
            raise ValueError(f"diffusion_norm={diffusion_norm}: must be finite and at least 0")
        if not 0 < last_step_size < 1:
            raise ValueError(f"last_step_size={last_step_size}: must be in (0, 1)")
        self.order = 2 if integrator == "heun" else 1
        super().__init__()

    # -- times --------------------------------------------------------------------------------------------------

    def _spaced(self, n: int | None) -> Tensor:
        t = super()._spaced(n)
        if self.config.timestep_spacing != "uniform":
            return t
        end, shift = self.config.last_step_size, self.config.shift
        return torch.linspace(1, end / (shift - (shift - 1) * end), len(t), dtype=torch.float64)

    def _start(self, t: Tensor) -> Tensor:
        singular = self.config.diffusion_form == "sbdm" and self.config.integrator != "exact"
        if self.interpolant.alpha(t[0]) != 0 or not (singular or self.prediction_type == "epsilon"):
            return t
        start = 1 - START_OFFSET
        if len(t) > 1 and t[1] >= start:
            raise ValueError(
                f"times {t[:2].tolist()}: diffusion_form={self.config.diffusion_form!r} with a {self.prediction_type} "
                f"model is undefined at alpha = 0 and starts at {start} there; the second time must be below that"
            )
        return torch.cat((t.new_tensor([start]), t[1:]))

    def _set(self, t: Tensor, device) -> None:
        if self.order == 2:
            t = torch.cat((t[:1], t[1:].repeat_interleave(2)))
            self.sample = self.prev_derivative = None
        super()._set(t, device)

    # -- steps --------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor]:
        """One move, or half of Heun's; ``model_output``, of the path's prediction type, and ``sample``: ``(B, ...)``.

        Raises:
            ValueError: Heun's rule entered at its second half.
        """
        i = self._index(timestep)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        output = model_output.to(x.dtype)
        if self.times[i + 1] == 0:
            x = self._finish(x, output, i, generator)
        elif self.config.integrator == "heun":
            x = self._heun(x, output, i, generator)
        elif self.config.integrator == "exact":
            x = self._exact(x, output, i, generator)
        else:
            x = self._euler(x, output, i, generator)
        self._step_index = i + 1
        x = x.to(sample.dtype)
        return StepOutput(prev_sample=x) if return_dict else (x,)

    def _view(self, name: str, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return self.interpolant.convert(output, self.prediction_type, name, x, t)

    def _rate(self, t: Tensor) -> float:
        return diffusion_over_sigma(self.interpolant, t, self.config.diffusion_form, self.config.diffusion_norm)

    def _fields(self, x: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor | float]:
        """Velocity ``v`` and ``w s``."""
        rate = self._rate(t)
        velocity = self._view("flow_prediction", x, output, t)
        return velocity, -rate * self._view("epsilon", x, output, t) if rate else 0.0

    def _kick(self, x: Tensor, i: int, generator: Generators) -> Tensor:
        """``x + sqrt(2 w h) z`` for the step from ``times[i]`` to ``times[i + 1]``."""
        t, h = self.times[i], float(self.times[i] - self.times[i + 1])
        w = self._rate(t) * float(self.interpolant.sigma(t))
        return x + math.sqrt(2 * w * h) * self._noise(x, generator) if w else x

    def _euler(self, x: Tensor, output: Tensor, i: int, generator: Generators) -> Tensor:
        dt = float(self.times[i + 1] - self.times[i])
        return self._kick(drift_step(x, *self._fields(x, output, self.times[i]), dt), i, generator)

    def _heun(self, x: Tensor, output: Tensor, i: int, generator: Generators) -> Tensor:
        velocity, pull = self._fields(x, output, self.times[i])
        if i % 2 == 0:
            self.sample, self.prev_derivative = x, velocity - pull
            return drift_step(x, velocity, pull, float(self.times[i + 1] - self.times[i]))
        if self.sample is None or self.prev_derivative is None:
            raise ValueError(f"step {i} of integrator='heun' is the second half of a step; begin at an even index")
        dt = float(self.times[i] - self.times[i - 1])
        x = self.sample + dt / 2 * (self.prev_derivative + velocity - pull)
        self.sample = self.prev_derivative = None
        # The noise of the next step comes first, so that the network sees it; before the last step there is none.
        return self._kick(x, i + 1, generator) if self.times[i + 2] > 0 else x

    def _exact(self, x: Tensor, output: Tensor, i: int, generator: Generators) -> Tensor:
        t = self.times[i]
        if self.config.diffusion_form == "sbdm":
            c2 = self.config.diffusion_norm
        else:  # at alpha = 0 the reference is infinite, and the ratio 0
            c2 = self._rate(t) / diffusion_over_sigma(self.interpolant, t, "sbdm", 1)
        clean, keep, noise_std = exact_coefficients(self.interpolant, t, self.times[i + 1], math.sqrt(c2))
        x = clean * self._view("sample", x, output, t) + keep * x
        return x + noise_std * self._noise(x, generator) if noise_std else x

    def _finish(self, x: Tensor, output: Tensor, i: int, generator: Generators) -> Tensor:
        t, last_step = self.times[i], self.config.last_step
        if last_step == "euler":
            return drift_step(x, self._view("flow_prediction", x, output, t), 0.0, -float(t))
        if last_step == "tweedie" or self.config.integrator == "exact":  # whose own step ends at the clean sample
            return self._view("sample", x, output, t)
        if last_step == "mean":
            return drift_step(x, *self._fields(x, output, t), -float(t))
        return self._euler(x, output, i, generator)


def drift_step(x: Tensor, velocity: Tensor, pull: Tensor | float, dt: float) -> Tensor:
    """``x + v dt + w s |dt|``: the mean of an Euler-Maruyama step, towards data (``dt < 0``) or towards noise.

    Adding ``sqrt(2 w |dt|) z`` completes the step. ``pull`` is ``w s``, so that nothing divides by ``sigma``; the
    fields may be those of an interpolant between two data sets, whose ``s`` is ``-E[z | x] / gamma``.
    """
    return x + dt * velocity + abs(dt) * pull


def diffusion_over_sigma(interpolant: Interpolant, t: Tensor, form: str, norm: float) -> float:
    """``w(t) / sigma(t)`` of a ``diffusion_form`` of :class:`InterpolantScheduler`: ``w s = -(w / sigma) E[eps | x]``.

    ``t`` is a float64 scalar. The quotient is formed by hand where ``w`` and ``sigma`` vanish together; it is infinite
    for ``sbdm`` at ``alpha = 0``.
    """
    if form == "none":
        return 0.0
    if form == "sigma":
        return norm
    sigma = interpolant.sigma(t)
    if form == "sbdm":
        return norm * float(interpolant.d_sigma(t) - interpolant.d_alpha(t) / interpolant.alpha(t) * sigma)
    w = {
        "constant": norm,
        "linear": norm * float(t),
        "decreasing": (1 - norm * math.cos(math.pi * t)) ** 2 / 4,
        "increasing-decreasing": norm * math.sin(math.pi * t) ** 2,
    }[form]
    return w / float(sigma)
