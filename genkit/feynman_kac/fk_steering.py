"""Feynman-Kac steering: particles weighed by a reward of what they are about to become."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genkit.feynman_kac.base import FeynmanKac, check_rewards
from genkit.guidance.base import Guided, Point
from genkit.registry import unknown
from genkit.sampling import State
from genkit.schedulers.exact_denoiser import exact_coefficients

POTENTIALS = ("difference", "max", "sum")


class FKSteering(FeynmanKac):
    """Samples the sampler's own law tilted by ``exp(lambda r(x0))``; the reward needs no gradient.

    With ``r_k = r(D_k)`` the reward of the predicted clean sample, ``k = 1, 2 ...`` counting the evaluations where it
    is asked for, the log-weight grows by::

        difference   lambda (r_k - r_{k-1})        r_0 = 0
        max          max_{j <= k} lambda r_j
        sum          sum_{j <= k} lambda r_j

    and, by the last evaluation, to ``lambda r_K`` in all, so that every potential has the same target; they differ in
    how early they select. The last step must end at ``D_K``, as those of the usual schedulers do. Copies separate only
    if the scheduler injects noise (``ExactDenoiserScheduler(noise_scale=1)``, DDIM with ``eta=1``).

    Args:
        num_particles, settings: see :class:`genkit.feynman_kac.base.FeynmanKac`.
        reward: ``(B, ...) -> (B,)``, of clean samples in float32 at least; each sample by itself.
        reward_scale: ``lambda``.
        potential: ``difference``, ``max`` or ``sum``.
        reward_interval: evaluations from one call of the reward to the next; the first evaluation, where samples are
            noise, is left out, the last never.
        lookahead_steps: where a group is to be resampled, draw ancestors by ``lambda (r(D') - r(D))`` too, ``D'`` the
            clean sample that many DDIM steps on. As much is taken from the survivors' weights, so the target stays. It
            costs ``lookahead_steps`` evaluations and one or two rewards; more particles may buy more.

    ``stats()["reward"]``, ``(E, N, K)``, has ``lambda r_k`` before resampling.

    Raises:
        ValueError: see :class:`FeynmanKac`; a reward of another shape.

    Source: Singhal et al., "A general framework for inference-time scaling and steering of diffusion models",
    arXiv 2501.06848, section 3; look-ahead: Giannone et al., arXiv 2510.05825, as an auxiliary particle filter.
    """

    memory_size = 2  # max or sum so far, and the total of the log-potentials

    def __init__(
        self,
        num_particles: int = 8,
        *,
        reward: Callable[[Tensor], Tensor],
        reward_scale: float = 1.0,
        potential: str = "difference",
        reward_interval: int = 1,
        lookahead_steps: int = 0,
        **settings: Any,
    ):
        super().__init__(num_particles, **settings)
        if potential not in POTENTIALS:
            raise ValueError(unknown("potential", potential, POTENTIALS))
        if reward_interval < 1:
            raise ValueError(f"reward_interval={reward_interval}: must be at least 1")
        if lookahead_steps < 0:
            raise ValueError(f"lookahead_steps={lookahead_steps}: must be at least 0")
        self.reward = reward
        self.reward_scale = reward_scale
        self.potential = potential
        self.reward_interval = reward_interval
        self.lookahead_steps = lookahead_steps

    def weighs_at(self):
        return {*range(self.reward_interval, self.last, self.reward_interval), self.last}

    def weigh(self, state, memory):
        reward = self._rewards(state.guided)
        self.note(reward=reward)
        peak, total = memory.unbind(-1)
        first = state.i == min(self.weighs_at())
        if self.potential == "max" and not first:
            peak = torch.maximum(peak, reward)
        else:
            peak = peak + reward if self.potential == "sum" else reward
        increment = peak
        if self.potential == "difference" or state.i == self.last:
            increment = reward - total
        return state, increment, torch.stack((peak, total + increment), -1)

    def look_ahead(self, state, memory):
        ends = self.times[state.i + 1 : state.i + 1 + self.lookahead_steps]
        ends = ends[ends > 0]
        if not self.lookahead_steps or not len(ends):
            return None
        guided, t = state.guided, state.t
        for end in ends:
            here = guided.prediction
            clean, keep, _ = exact_coefficients(here.interpolant, t, end, 0.0)
            guided, t = self._evaluate((clean * here.sample + keep * here.z).to(here.z.dtype), end, state), end
        gain = self._rewards(guided) - self._rewards(state.guided)
        # Any finite modulation is unbiased: what the reward cannot tell is left out.
        return gain.where(gain.isfinite(), 0)

    def _evaluate(self, x: Tensor, t: Tensor, state: State) -> Guided:
        if self.guider is None:
            prediction = self.denoiser(x, t, self.condition)
            return Guided(prediction, {"cond": prediction})
        point = Point(self.denoiser, x, t, None, None, self.condition)
        guided, _ = self.guider.guide(point, state.guider_state)
        return guided

    def _rewards(self, guided: Guided) -> Tensor:
        clean = guided.prediction.sample
        clean = clean.to(torch.promote_types(clean.dtype, torch.float32))
        return self.grouped(self.reward_scale * check_rewards(self.reward(clean), len(clean)))
