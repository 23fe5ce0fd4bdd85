"""Interpolants: the path ``x_t = alpha(t) x0 + sigma(t) eps`` that every method of the toolkit moves on.

Clean sample ``x0`` at ``t = 0``, noise ``eps`` at ``t = 1``. Four prediction types, in Diffusers' words:

=================== ==========================================================
``epsilon``         the noise ``eps``
``sample``          the clean sample ``x0``
``v_prediction``    ``alpha eps - sigma x0``
``flow_prediction`` the velocity ``dx_t/dt = alpha' x0 + sigma' eps``
=================== ==========================================================

Given ``x_t`` each determines ``(x0, eps)`` except where a coefficient vanishes: ``epsilon`` says nothing of ``x0``
where ``alpha = 0``, ``sample`` nothing of ``eps`` where ``sigma = 0``. Those conversions raise; the others are exact.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from genkit.registry import unknown

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def expand(t: Tensor, like: Tensor) -> Tensor:
    """``t`` of shape ``(B,)`` or ``()`` with trailing axes, so that it multiplies ``like`` of shape ``(B, ...)``."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def _wide(t: Tensor, like: Tensor) -> Tensor:
    """Time-dependent coefficients of a sample: at least float32, and float64 only where the sample is."""
    return t.to(torch.promote_types(like.dtype, torch.float32))


class Interpolant(ABC):
    """A path between data and noise, and the map between its time and a network's native timestep.

    ``t`` has shape ``(B,)`` or ``()``, float32 at least; coefficients come back in the shape and dtype of ``t``.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the clean sample."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """``d alpha / dt``."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """``d sigma / dt``."""

    @abstractmethod
    def time(self, timestep: Tensor) -> Tensor:
        """Native timestep -> ``t``, float64, so that :meth:`timestep` gives the same number back exactly."""

    @abstractmethod
    def _timestep(self, t: Tensor) -> Tensor:
        """``t`` in float64 -> native timestep in float64."""

    def timestep(self, t: Tensor) -> Tensor:
        """``t`` -> native timestep, computed in float64 and rounded to float32."""
        return self._timestep(t.double()).float()

    def time_at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``t``, float64, at which ``sigma(t) / alpha(t) = sigma / alpha``, or the end of the path nearest to it.

        Both arguments are at least 0 and not 0 together.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no time_at, the inverse of sigma / alpha")

    # -- the path ---------------------------------------------------------------------------------------------

    def same_as(self, other: "Interpolant") -> bool:
        """Whether ``other`` has the same ``alpha`` and ``sigma`` at all times, to float32 rounding."""
        t = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
        pairs = ((self.alpha(t), other.alpha(t)), (self.sigma(t), other.sigma(t)))
        return all(torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7) for a, b in pairs)

    def interpolate(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t = alpha x0 + sigma eps``; shapes ``(B, ...)``, ``(B, ...)``, ``(B,)``."""
        t = _wide(t, x0)
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``v = alpha' x0 + sigma' eps``, the derivative of the path for given ends."""
        t = _wide(t, x0)
        return expand(self.d_alpha(t), x0) * x0 + expand(self.d_sigma(t), x0) * eps

    def target(self, prediction_type: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a network of ``prediction_type`` regresses to when the path's ends are ``x0`` and ``eps``."""
        check_prediction_type(prediction_type)
        if prediction_type == "epsilon":
            return eps
        if prediction_type == "sample":
            return x0
        if prediction_type == "flow_prediction":
            return self.velocity(x0, eps, t)
        t = _wide(t, x0)
        return expand(self.alpha(t), x0) * eps - expand(self.sigma(t), x0) * x0

    # -- conversions ------------------------------------------------------------------------------------------

    def ends(self, prediction: Tensor, prediction_type: str, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(x0, eps)`` that ``prediction`` implies at ``x_t = x``.

        Raises:
            ValueError: ``epsilon`` where ``alpha = 0`` or ``sample`` where ``sigma = 0``.
        """
        x0 = self.convert(prediction, prediction_type, "sample", x, t)
        return x0, self.convert(prediction, prediction_type, "epsilon", x, t)

    def convert(self, prediction: Tensor, source: str, target: str, x: Tensor, t: Tensor) -> Tensor:
        """``prediction`` of type ``source`` at ``(x, t)``, as type ``target``.

        With ``W = alpha sigma' - alpha' sigma`` (1 on the linear path)::

            v_prediction V:    x0 = (alpha x - sigma V) / (alpha^2 + sigma^2)   eps = (sigma x + alpha V) / (...)
            flow_prediction v: x0 = (sigma' x - sigma v) / W                    eps = (alpha v - alpha' x) / W
            epsilon e:         x0 = (x - sigma e) / alpha
            sample D:          eps = (x - alpha D) / sigma

        Shapes: ``prediction`` and ``x`` ``(B, ...)``, ``t`` ``(B,)`` or ``()``.

        Raises:
            ValueError: an unknown type, or a conversion that divides by ``alpha = 0`` or ``sigma = 0``.
        """
        check_prediction_type(source)
        check_prediction_type(target)
        if source == target:
            return prediction
        t = _wide(t, x)
        alpha, sigma = self.alpha(t), self.sigma(t)
        needs_x0, needs_eps = target != "epsilon", target != "sample"
        x0 = eps = prediction
        if source == "epsilon":
            _refuse_zero(alpha, t, "alpha", source, target, "x0", "v_prediction or flow_prediction model")
            x0 = (x - expand(sigma, x) * eps) / expand(alpha, x)
        elif source == "sample":
            _refuse_zero(sigma, t, "sigma", source, target, "eps", "v_prediction or flow_prediction model")
            eps = (x - expand(alpha, x) * x0) / expand(sigma, x)
        elif source == "v_prediction":
            norm = alpha**2 + sigma**2
            if needs_x0:
                x0 = (expand(alpha, x) * x - expand(sigma, x) * prediction) / expand(norm, x)
            if needs_eps:
                eps = (expand(sigma, x) * x + expand(alpha, x) * prediction) / expand(norm, x)
        else:
            d_alpha, d_sigma = self.d_alpha(t), self.d_sigma(t)
            wronskian = expand(alpha * d_sigma - d_alpha * sigma, x)
            if needs_x0:
                x0 = (expand(d_sigma, x) * x - expand(sigma, x) * prediction) / wronskian
            if needs_eps:
                eps = (expand(alpha, x) * prediction - expand(d_alpha, x) * x) / wronskian
        return self.target(target, x0, eps, t)

    def to_update(self, update: Tensor, target: str, t: Tensor) -> Tensor:
        """The change of a prediction of type ``target`` that moves its clean sample by ``update``, at fixed ``x_t``.

        ``d x0 = U`` implies ``d eps = -(alpha/sigma) U``; both are put through the definition of ``target``. Better
        conditioned than converting to ``x0`` and back, and finite wherever ``sigma > 0``.
        """
        check_prediction_type(target)
        if target == "sample":
            return update
        t = _wide(t, update)
        alpha, sigma = self.alpha(t), self.sigma(t)
        _refuse_zero(sigma, t, "sigma", "sample", target, "eps", "last time above 0")
        if target == "epsilon":
            slope = -alpha / sigma
        elif target == "v_prediction":
            slope = -(alpha**2 / sigma + sigma)
        else:
            slope = self.d_alpha(t) - self.d_sigma(t) * alpha / sigma
        return expand(slope, update) * update


def check_prediction_type(prediction_type: str) -> None:
    """Raise ``ValueError`` for a prediction type that is not one of Diffusers' four words."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(unknown("prediction_type", prediction_type, PREDICTION_TYPES))


def _refuse_zero(coefficient: Tensor, t: Tensor, name: str, source: str, target: str, lost: str, remedy: str) -> None:
    # Under torch.func transforms and compilation values cannot be looked at; those callers keep t inside (0, 1).
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return
    if bool((coefficient == 0).any()):
        bad = t[coefficient == 0].flatten()[0].item() if t.ndim else t.item()
        raise ValueError(
            f"cannot turn prediction_type={source!r} into {target!r} at t={bad:g}: {name}(t) = 0 there, so the "
            f"prediction says nothing of {lost}; use a {remedy}, or keep t away from this end."
        )


class Linear(Interpolant):
    """Straight path of flow matching and rectified flow: ``alpha = 1 - t``, ``sigma = t``.

    Native timestep ``num_train_timesteps * t`` (SD3, Flux's scheduler). Source: Lipman et al., "Flow matching for
    generative modeling", arXiv 2210.02747; Liu et al., arXiv 2209.03003.
    """

    def __init__(self, num_train_timesteps: float = 1000):
        self.num_train_timesteps = num_train_timesteps

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def d_alpha(self, t):
        return -torch.ones_like(t)

    def d_sigma(self, t):
        return torch.ones_like(t)

    def time(self, timestep):
        return timestep.double() / self.num_train_timesteps

    def _timestep(self, t):
        return t * self.num_train_timesteps

    def time_at(self, alpha, sigma):
        return sigma.double() / (alpha.double() + sigma.double())


class Trigonometric(Interpolant):
    """``alpha = cos(pi t / 2)``, ``sigma = sin(pi t / 2)``; native timestep: the angle ``pi t / 2`` (TrigFlow).

    Source: Lu and Song, "Simplifying, stabilizing and scaling continuous-time consistency models", arXiv 2410.11081.
    """

    def alpha(self, t):
        return torch.cos(t * (math.pi / 2)).where(t != 1, 0)  # cos(pi/2) is not 0 in floating point

    def sigma(self, t):
        return torch.sin(t * (math.pi / 2))

    def d_alpha(self, t):
        return -(math.pi / 2) * self.sigma(t)

    def d_sigma(self, t):
        return (math.pi / 2) * self.alpha(t)

    def time(self, timestep):
        return timestep.double() / (math.pi / 2)

    def _timestep(self, t):
        return t * (math.pi / 2)

    def time_at(self, alpha, sigma):
        return torch.atan2(sigma.double(), alpha.double()) / (math.pi / 2)


class VariancePreserving(Interpolant):
    """Continuous variance-preserving path with a linear rate ``beta(t) = beta_min + t (beta_max - beta_min)``.

    ``alpha = exp(-B/2)``, ``sigma = sqrt(1 - exp(-B))`` with ``B(t)`` the integral of ``beta``. ``sigma'`` is infinite
    at ``t = 0``. Native timestep ``num_train_timesteps * t``. Source: Song et al., arXiv 2011.13456, equation 32.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, num_train_timesteps: float = 1000):
        self.beta_min, self.beta_max, self.num_train_timesteps = beta_min, beta_max, num_train_timesteps

    def _integral(self, t):
        return t * self.beta_min + t**2 * ((self.beta_max - self.beta_min) / 2)

    def _rate(self, t):
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def alpha(self, t):
        return torch.exp(-self._integral(t) / 2)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def d_alpha(self, t):
        return -self._rate(t) / 2 * self.alpha(t)

    def d_sigma(self, t):
        return self._rate(t) / 2 * self.alpha(t) ** 2 / self.sigma(t)

    def time(self, timestep):
        return timestep.double() / self.num_train_timesteps

    def _timestep(self, t):
        return t * self.num_train_timesteps

    def time_at(self, alpha, sigma):
        end = self._integral(1.0)
        integral = torch.log1p((sigma.double() / alpha.double()) ** 2).clamp(max=end)
        # The root of the quadratic in the form that has no cancellation.
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt()
        return 2 * integral / (self.beta_min + root)


class DiscreteVP(Interpolant):
    """Variance-preserving path through Diffusers' ``alphas_cumprod``: exact at every trained timestep.

    Timestep ``k`` sits at ``t = (k + 1) / N``; ``t = 0`` is clean data. Between trained timesteps ``log(sigma/alpha)``
    is linear in the timestep, as in Diffusers' samplers with fractional timesteps; in an interval where that is
    infinite (from clean data to the first timestep; into a last one of zero signal) the angle ``atan2(sigma, alpha)``
    is linear instead. Derivatives are those of this curve, constant in log-ratio or angle per interval.

    Args:
        alphas_cumprod: decreasing, shape ``(N,)``, in ``(0, 1)``; the last may be 0 (zero terminal SNR).
    """

    def __init__(self, alphas_cumprod: Tensor):
        cumprod = torch.as_tensor(alphas_cumprod).detach().cpu().double()
        if cumprod.ndim != 1 or not bool((cumprod[:-1] > cumprod[1:]).all()):
            raise ValueError(f"alphas_cumprod must be 1-D and strictly decreasing, got shape {tuple(cumprod.shape)}")
        if not (0 <= cumprod[-1] and cumprod[0] < 1):
            raise ValueError(f"alphas_cumprod must lie in [0, 1), got [{cumprod[-1].item():g}, {cumprod[0].item():g}]")
        self.num_train_timesteps = len(cumprod)
        cumprod = torch.cat((cumprod.new_ones(1), cumprod))
        self._angle = torch.atan2((1 - cumprod).sqrt(), cumprod.sqrt())
        self._log_ratio = 0.5 * (torch.log1p(-cumprod) - cumprod.log())
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            self._tables[device] = (self._angle.to(device), self._log_ratio.to(device))
        return self._tables[device]

    def _angle_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Angle ``theta`` with ``alpha = cos``, ``sigma = sin``, and ``d theta / dt``, both in float64."""
        angle, log_ratio = self._tables_on(t.device)
        n = self.num_train_timesteps
        position = t.double() * n
        k = position.detach().floor().long().clamp(0, n - 1)
        w = position - k
        # A node is given its own table entry, not an interpolation that rounds.
        by_angle = torch.lerp(angle[k], angle[k + 1], w)
        angle_rate = (angle[k + 1] - angle[k]) * n
        lo, hi = log_ratio[k], log_ratio[k + 1]
        finite = torch.isfinite(lo) & torch.isfinite(hi)
        lo, hi = lo.where(finite, 0), hi.where(finite, 0)
        by_ratio = torch.atan(torch.exp(torch.lerp(lo, hi, w)))
        theta = by_ratio.where(finite, by_angle)
        theta = theta.where(w != 0, angle[k])
        rate = ((hi - lo) * n * torch.sin(theta) * torch.cos(theta)).where(finite, angle_rate)
        return theta, rate

    def alpha(self, t):
        theta, _ = self._angle_and_rate(t)
        return torch.cos(theta).where(theta < math.pi / 2, 0).to(t.dtype)

    def sigma(self, t):
        return torch.sin(self._angle_and_rate(t)[0]).to(t.dtype)

    def d_alpha(self, t):
        theta, rate = self._angle_and_rate(t)
        return (-torch.sin(theta) * rate).to(t.dtype)

    def d_sigma(self, t):
        theta, rate = self._angle_and_rate(t)
        return (torch.cos(theta) * rate).to(t.dtype)

    def time(self, timestep):
        return (timestep.double() + 1) / self.num_train_timesteps

    def _timestep(self, t):
        return t * self.num_train_timesteps - 1

    def time_at(self, alpha, sigma):
        alpha, sigma = alpha.double(), sigma.double()
        theta = torch.atan2(sigma, alpha).contiguous()
        angle, log_ratio = self._tables_on(theta.device)
        n = self.num_train_timesteps
        k = (torch.searchsorted(angle, theta.detach(), right=True) - 1).clamp(0, n - 1)
        lo, hi = log_ratio[k], log_ratio[k + 1]
        finite = torch.isfinite(lo) & torch.isfinite(hi)
        lo, hi = lo.where(finite, 0), hi.where(finite, 1)
        ratio = (sigma / alpha.where(finite, 1)).where(finite, 1)
        by_ratio = (ratio.log() - lo) / (hi - lo)
        by_angle = (theta - angle[k]) / (angle[k + 1] - angle[k])
        return ((k + by_ratio.where(finite, by_angle)) / n).clamp(0, 1)


class VarianceExploding(Interpolant):
    """``alpha = 1``, ``sigma = sigma_max t``: the path of EDM, its noise level scaled to end at ``t = 1``.

    Native timestep ``log(sigma) / 4``, EDM's ``c_noise``, minus infinity at ``t = 0``. Source: Karras et al.,
    "Elucidating the design space of diffusion-based generative models", arXiv 2206.00364, table 1.
    """

    def __init__(self, sigma_max: float = 80.0):
        self.sigma_max = sigma_max

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return self.sigma_max * t

    def d_alpha(self, t):
        return torch.zeros_like(t)

    def d_sigma(self, t):
        return torch.full_like(t, self.sigma_max)

    def time(self, timestep):
        return torch.exp(4 * timestep.double()) / self.sigma_max

    def _timestep(self, t):
        return torch.log(self.sigma_max * t) / 4

    def time_at(self, alpha, sigma):
        return (sigma.double() / alpha.double() / self.sigma_max).clamp(max=1)


_FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
_EDM = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"}


def from_scheduler(scheduler) -> Interpolant:
    """The interpolant whose ``x_t`` a network under this Diffusers scheduler is given.

    By family: flow matching (or ``use_flow_sigmas`` / ``prediction_type="flow_prediction"``) -> :class:`Linear`;
    anything with ``alphas_cumprod`` (DDPM, DDIM, PNDM, DPM-Solver, UniPC, Euler, Heun, LCM, TCD ...) ->
    :class:`DiscreteVP`, also where the scheduler's own sample is variance-exploding, since ``scale_model_input`` makes
    the network's input variance-preserving; EDM's -> :class:`VarianceExploding`; TrigFlow's -> :class:`Trigonometric`.

    Raises:
        ValueError: a scheduler without a continuous state, or of no known family.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    if isinstance(getattr(scheduler, "interpolant", None), Interpolant):  # genkit's own schedulers say it themselves
        return scheduler.interpolant
    if name in _FLOW or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return Linear(config.get("num_train_timesteps", 1000))
    if name in _EDM:
        return VarianceExploding(config["sigma_max"])
    if name == "SCMScheduler":
        return Trigonometric()
    cumprod = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(cumprod, Tensor) and cumprod.ndim == 1:
        return DiscreteVP(cumprod)
    raise ValueError(
        f"scheduler={name} has no interpolant known to genkit; accepted are Diffusers' flow-matching schedulers, those "
        "with alphas_cumprod (DDPM, DDIM, PNDM, DPM-Solver, UniPC, Euler, Heun, LCM ...), EDM's and SCMScheduler"
    )


def scheduler_prediction_type(scheduler) -> str:
    """The prediction type that ``scheduler`` expects of its model.

    Flow-matching schedulers carry no ``prediction_type`` in their config and take the velocity ``eps - x0``; TrigFlow's
    takes ``d x / d angle``, which is ``alpha eps - sigma x0``.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    if isinstance(getattr(scheduler, "interpolant", None), Interpolant):
        return scheduler.prediction_type
    if name in _FLOW or config.get("use_flow_sigmas"):
        return "flow_prediction"
    if name == "SCMScheduler":
        return "v_prediction"
    prediction_type = config.get("prediction_type", "epsilon")
    check_prediction_type(prediction_type)
    return prediction_type
