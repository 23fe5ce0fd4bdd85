"""Denoising chains with a learned variance, on few of a thousand steps: what draws the tokens of a diffusion head."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from genkit.rng import ItemRNG

TRAIN_STEPS = 1000
Head = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def log_variance(logits: Tensor, log_beta: Tensor | float, log_posterior: Tensor | float) -> Tensor:
    """``r log beta + (1 - r) log beta~`` with ``r = (logit + 1) / 2``."""
    r = (logits + 1) / 2
    return r * log_beta + (1 - r) * log_posterior


class GaussianChain:
    """``x_{j-1} ~ N(mean_j, exp(logvar_j))`` with ``mean = (x_j - beta_j / sqrt(1 - abar_j) eps) / sqrt(1 - beta_j)``.

    Of the cosine schedule ``abar(u) = cos^2(pi/2 (u + 0.008) / 1.008)`` on 1000 steps, with ``beta <= 0.999``, those at
    ``min(round(999 j / (T - 1)), max_timestep)`` are kept; steps that coincide are one. Between them
    ``beta_j = 1 - abar_j / abar_{j-1}``. :func:`log_variance` is between that of ``beta`` and that of the posterior,
    ``beta~ = beta (1 - abar_{j-1}) / (1 - abar_j)``. One step jumps to the clean sample from ``max_timestep``.

    Args:
        num_steps: ``T``, 1 to 1000, before steps that coincide become one.
        max_timestep: the noisiest step, 0 to 999. At 999 ``abar = 2.4e-9``, and few steps cannot follow from there;
            950 (``abar = 0.0058``) is what DiSA has.

    Attributes:
        timesteps: those kept, ascending, by their number among the thousand.
        abar, beta, log_beta, log_posterior: float64, one a step. The posterior's variance at the first step, which is
            0, is replaced by the second's.

    Raises:
        ValueError: numbers out of range.

    Source: Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", arXiv 2102.09672, equations 9, 10,
    15 and 17; the largest timestep: Zhao et al., arXiv 2505.20297.
    """

    def __init__(self, num_steps: int = TRAIN_STEPS, max_timestep: int = TRAIN_STEPS - 1):
        last = TRAIN_STEPS - 1
        if not 1 <= num_steps <= TRAIN_STEPS:
            raise ValueError(f"num_steps={num_steps}: accepted are 1 to {TRAIN_STEPS}")
        if not 0 <= max_timestep <= last:
            raise ValueError(f"max_timestep={max_timestep}: accepted are 0 to {last}")
        spaced = [round(last * j / (num_steps - 1)) for j in range(num_steps)] if num_steps > 1 else [last]
        self.timesteps = sorted({min(i, max_timestep) for i in spaced})
        u = torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
        level = ((u + 0.008) / 1.008 * math.pi / 2).cos().square()
        whole = (level[1:] / level[:-1]).clamp(min=0.001).cumprod(0)
        self.abar = whole[self.timesteps]
        before = torch.cat((torch.ones(1, dtype=torch.float64), self.abar[:-1]))
        self.beta = 1 - self.abar / before
        posterior = self.beta * (1 - before) / (1 - self.abar)
        posterior[0] = posterior[1] if len(posterior) > 1 else self.beta[0]
        self.log_beta, self.log_posterior = self.beta.log(), posterior.log()

    def __len__(self) -> int:
        return len(self.timesteps)

    def sample(
        self, head: Head, rng: ItemRNG, shape: tuple[int, ...], *, dtype: torch.dtype, temperature: float = 1.0
    ) -> Tensor:
        """Clean samples ``(B, *shape)``, one a row of ``rng``, in ``dtype``.

        Args:
            head: noise and variance logits of ``(x, timestep)``.
            temperature: what the noise of each step is multiplied by; that at the start is not.
        """
        x = rng.normal(shape, dtype=dtype)
        for j in reversed(range(len(self))):
            epsilon, logits = (v.to(dtype) for v in head(x, self.timesteps[j]))
            beta, abar = self.beta[j].item(), self.abar[j].item()
            x = (x - beta / math.sqrt(1 - abar) * epsilon) / math.sqrt(1 - beta)
            if j:
                log_var = log_variance(logits, self.log_beta[j].item(), self.log_posterior[j].item())
                x = x + (log_var / 2).exp() * temperature * rng.normal(shape, dtype=dtype)
        return x
