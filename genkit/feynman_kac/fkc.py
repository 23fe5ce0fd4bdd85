"""Feynman-Kac correctors: weights under which a sum of scores samples the density that it claims."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from genkit.denoisers.base import Prediction
from genkit.feynman_kac.base import FeynmanKac, check_rewards
from genkit.guidance.base import Guider
from genkit.guidance.cfg import CFG
from genkit.guidance.experts import Experts
from genkit.interpolants import Interpolant
from genkit.schedulers.exact_denoiser import ExactDenoiserScheduler


def default_schedule(kappa: float) -> float:
    """``1 / (1 + kappa^2)``: a reward counts fully at clean data, and at high noise no longer than the data's scale."""
    return 1 / (1 + kappa**2)


class FKC(FeynmanKac):
    """Corrects guidance, annealing, products of experts, reward tilts and any mixture of them.

    The density is what guider and scheduler claim, ``p_t = prod_i q_t^{b_i} exp(rho) / Z_t``, with exponents summing to
    the scheduler's ``B = exponent_sum``: ``{cond: B}`` without a guider (annealing), ``{cond: w B, uncond: (1 - w) B}``
    under CFG of scale ``w``, and those of :class:`genkit.guidance.experts.Experts`. With ``D_i`` the clean-sample
    predictions, ``D = sum_i b_i D_i / B``, ``eps = (x - alpha D)/sigma``, ``y = x/alpha``, ``kappa = sigma/alpha``, the
    score sum is ``S = B (D - y)/kappa^2`` and, whatever the sampler's injected noise, the log-weight grows by::

        d log w = - [ B (B - 1) |eps|^2/kappa^2 - sum_i b_i |D_i - D|^2/kappa^4 + <grad_y rho, S> ] d(kappa^2)/2
                  + (d rho / d kappa at fixed y) d kappa

    For CFG that is ``w (w - 1) |D_c - D_u|^2 / (2 kappa^4)``. The three terms are integrated by the trapezoidal rule
    against ``d log kappa^2``, ``d (1/kappa^2)`` and ``d kappa``, over whose powers predictions vary slowly; the last is
    the mean over both ends of the change of ``rho`` at fixed ``y``. The step from ``alpha = 0`` (``kappa`` infinite)
    keeps the second term alone. A reward also moves the clean sample by ``kappa^2 c^2 / ((1 + c^2) B) grad_y rho``: the
    drift ``c^2/2 grad_y rho`` that goes with the noise ``c`` which the scheduler injects.

    Use :class:`ExactDenoiserScheduler` with ``noise_scale`` 1 or so: without noise copies never separate, and for
    ``B != 1`` the cloud collapses. Any other scheduler without history will do where ``B = 1`` and there is no reward.
    Initial samples are ``scheduler.init_noise_sigma`` times standard normal. ``log_z`` estimates
    ``log Z(last) - log Z(first)``, the integrals over ``y`` of ``prod_i q_i^{b_i} e^{rho}`` at the last noise level and
    of ``prod_i q_i^{b_i}`` at the first one of finite ``kappa``; for ``B = 1`` the latter is 1 at large ``kappa``.

    Args:
        num_particles, settings: see :class:`genkit.feynman_kac.base.FeynmanKac`.
        reward: ``r(x)``, differentiable, ``(B, ...) -> (B,)``, of noisy samples ``x_t``; each sample by itself.
        reward_scale: ``lambda`` in ``rho(x, t) = lambda beta(kappa) r(x)``.
        reward_schedule: ``beta``, from ``kappa`` (infinite at pure noise) to a number; 1 at 0 and so small at the start
            that the tilt of the noise is negligible or, where that start is at finite ``kappa``, corrected by weights.

    Weights live on differences of predictions, whose rounding adds up over dimensions: under CFG, velocities in
    bfloat16 shift ``log_z`` by about ``2e-5 w (w - 1)`` a dimension, which is common to a group up to a tenth of its
    weights' spread; float16 does by 40 times less. Networks that predict clean samples in bfloat16 bury the weights:
    use float32.

    ``stats()["tilt"]``, ``(E, N, K)``, has ``rho`` of the samples before resampling, where there is a reward.

    Raises:
        ValueError: see :class:`FeynmanKac`; before a run also: a guider that follows no score sum of fixed exponents
            (windows and rescaling among them), exponents that do not sum to the scheduler's, a reward under another
            scheduler than ExactDenoiserScheduler.

    Source: Skreta et al., "Feynman-Kac correctors in diffusion: annealing, guidance, and product of experts",
    arXiv 2503.02819, propositions 3.1 to 3.4 and appendix; the form for any noise and the quadrature are derived here.
    """

    memory_size = 1  # the first half of the increment over the coming step

    def __init__(
        self,
        num_particles: int = 8,
        *,
        reward: Callable[[Tensor], Tensor] | None = None,
        reward_scale: float = 1.0,
        reward_schedule: Callable[[float], float] = default_schedule,
        **settings: Any,
    ):
        super().__init__(num_particles, **settings)
        if not math.isfinite(reward_scale):
            raise ValueError(f"reward_scale={reward_scale}: must be finite")
        self.reward = reward
        self.reward_scale = reward_scale
        self.reward_schedule = reward_schedule

    def start_run(self, denoiser, scheduler, x, condition, guider):
        super().start_run(denoiser, scheduler, x, condition, guider)
        exact = isinstance(scheduler, ExactDenoiserScheduler)
        if self.reward is not None and not exact:
            raise ValueError(
                f"scheduler={type(scheduler).__name__}: a reward's drift depends on the noise that is injected; use "
                "ExactDenoiserScheduler, which says it (noise_scale)"
            )
        self.total = scheduler.config.exponent_sum if exact else 1.0
        self.exponents = _exponents(guider, self.total, self.times[:-1])
        if isinstance(guider, Experts):
            for name, (_, own) in guider.experts.items():
                if own is not None:
                    self.check_groups(f"experts[{name!r}]", own)

    def weigh(self, state, memory):
        path, t = state.guided.prediction.interpolant, state.t
        increment, coming = torch.zeros_like(memory[..., 0]), torch.zeros_like(memory[..., 0])
        before = self.times[state.i - 1] if state.i else None
        scores = _Scores(state.guided.parts, self.exponents, self.total)
        if before is not None:
            increment = memory[..., 0] + self.grouped(scores.half(before, t))
        if state.t_next > 0:
            coming = self.grouped(scores.half(t, state.t_next))
        if self.reward is None or path.alpha(t) == 0:
            return state, increment, coming[..., None]
        x = scores.z
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self._reward(leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)

        def tilt(time: Tensor) -> Tensor:
            """``rho`` at ``time`` for the same ``y``."""
            ratio = float(path.alpha(time) / path.alpha(t))
            return self.grouped(self._beta(path, time) * (value if ratio == 1 else self._reward(ratio * x)))

        here = tilt(t)
        self.note(tilt=here)
        slope = self.grouped(self._beta(path, t) * float(path.alpha(t)) * (gradient * scores.noise).flatten(1).sum(1))
        if before is None or path.alpha(before) == 0:
            increment = increment + here  # the first finite kappa: samples are drawn without the tilt
        else:
            fall = _kappa(path, before) - _kappa(path, t)
            increment = increment - scores.total * fall * slope / 2 + (here - tilt(before)) / 2
        if state.t_next > 0:
            fall = _kappa(path, t) - _kappa(path, state.t_next)
            coming = coming - scores.total * fall * slope / 2 + (tilt(state.t_next) - here) / 2
            c2 = state.scheduler.config.noise_scale**2
            share = c2 / ((1 + c2) * scores.total) * float(path.sigma(t)) ** 2 / float(path.alpha(t))
            moved = state.guided.prediction.moved(share * self._beta(path, t) * gradient)
            state = replace(state, guided=replace(state.guided, prediction=moved))
        return state, increment, coming[..., None]

    def _beta(self, path: Interpolant, t: Tensor) -> float:
        return self.reward_scale * self.reward_schedule(_kappa(path, t))

    def _reward(self, x: Tensor) -> Tensor:
        assert self.reward is not None
        return check_rewards(self.reward(x), len(x))


class _Scores:
    """What the experts' predictions say at one point: the mean noise, and how far the clean samples lie apart."""

    def __init__(self, parts: Mapping[str, Prediction], exponents: Mapping[str, float], total: float):
        first = parts[next(iter(exponents))]
        wide = torch.promote_types(first.raw.dtype, torch.float32)
        self.path, self.t, self.z = first.interpolant, first.t, first.z.to(wide)
        self.total = total  # the sum of the exponents, free of their rounding
        mean, spread = (
            torch.zeros_like(first.sample, dtype=wide),
            torch.zeros(len(self.z), dtype=wide).to(self.z.device),
        )
        for name, b in exponents.items():
            off = parts[name].sample.to(wide) - first.sample.to(wide)  # exactly 0 where experts are equal
            mean, spread = mean + b / total * off, spread + b * off.square().flatten(1).sum(1)
        self.spread = spread - total * mean.square().flatten(1).sum(1)
        self.parts, self.exponents, self.wide = parts, exponents, wide

    @cached_property
    def noise(self) -> Tensor:
        """The noise of the score sum, ``sum_i b_i eps_i / B``, shape of the samples."""
        noise = torch.zeros_like(self.z)
        for name, b in self.exponents.items():
            noise = noise + b / self.total * self.parts[name].epsilon.to(self.wide)
        return noise

    def half(self, start: Tensor, end: Tensor) -> Tensor:
        """This end's half of the trapezoidal rule over the step from ``start`` to ``end``."""
        high, low = _kappa(self.path, start), _kappa(self.path, end)
        apart = -self.spread * (1 / low**2 - 1 / high**2)
        b = self.total
        if b == 1 or math.isinf(high):
            return apart / 4
        return (apart + b * (b - 1) * 2 * math.log(high / low) * self.noise.square().flatten(1).sum(1)) / 4


def _kappa(path: Interpolant, t: Tensor) -> float:
    alpha = float(path.alpha(t))
    return float(path.sigma(t)) / alpha if alpha else math.inf


def _exponents(guider: Guider | None, total: float, times: Tensor) -> dict[str, float]:
    """The exponents of the density that ``guider`` claims under a scheduler of exponents' sum ``total``."""
    active = set() if guider is None else {guider.active(t) for t in times}
    if guider is not None and not isinstance(guider, Experts) and type(guider) is not CFG:
        raise ValueError(
            f"guider={type(guider).__name__} follows no sum of scores with fixed exponents; accepted are None, CFG and "
            "Experts"
        )
    if len(active) == 2:
        raise ValueError(
            f"{type(guider).__name__} with start={guider.start}, stop={guider.stop}: the density would jump where "  # type: ignore[union-attr]
            "guidance begins or ends, with weights that no score determines; leave the window out"
        )
    if True not in active:
        return {"cond": total}
    if isinstance(guider, Experts):
        exponents = guider.active_exponents
        if not math.isclose(sum(exponents.values()), total, rel_tol=1e-9):
            raise ValueError(
                f"exponents={exponents} sum to {sum(exponents.values()):g}, the scheduler's exponent_sum is {total:g}: "
                "they must agree"
            )
        return exponents
    assert isinstance(guider, CFG)
    if guider.guidance_rescale:
        raise ValueError(
            f"guidance_rescale={guider.guidance_rescale}: a rescaled prediction is no sum of scores; FKC needs 0"
        )
    w = guider.guidance_scale
    return {name: b * total for name, b in (("cond", w), ("uncond", 1 - w)) if b}
