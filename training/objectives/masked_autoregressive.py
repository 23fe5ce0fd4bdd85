"""Masked autoregression with a diffusion loss."""

import math
from collections.abc import Iterator

import torch
from pydantic import Field, model_validator
from torch import Tensor

from genkit.gaussian_chain import TRAIN_STEPS, GaussianChain, log_variance
from genkit.masked_autoregressive import MaskedAutoregressive
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, drop_condition, shared


class MaskedAutoregressionConfig(ObjectiveConfig):
    """Settings of :class:`MaskedAutoregression`.

    The share of tokens that are masked is a normal of ``mask_mean`` and ``mask_std``, cut to ``[mask_min, 1]``. Each
    masked token is learned from at ``diffusion_batch_mul`` noise levels. ``condition_dropout``: share of items that are
    learned without class, so that the model can be guided.
    """

    mask_mean: float = 1.0
    mask_std: float = Field(0.25, gt=0)
    mask_min: float = Field(0.7, gt=0, lt=1)
    diffusion_batch_mul: int = Field(4, ge=1)
    condition_dropout: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _reachable(self):
        low, high = _normal_cdf(self)
        if high - low < 1e-6:
            raise ValueError(
                f"mask_mean={self.mask_mean}, mask_std={self.mask_std}: hardly anything of this normal is within "
                f"[mask_min, 1] = [{self.mask_min}, 1]"
            )
        return self


class MaskedAutoregression(Objective):
    """``E |eps - eps_theta(x_t, t, z_i)|^2`` of masked tokens given the others, and the bound for its variance.

    The first ``ceil(ratio L)`` tokens of a random order are masked, by one ratio for the whole batch. The variance of
    the head is learned by the variational bound of the chain, in bits a dimension, without gradient to the mean; at
    its first step that is ``-log`` of a density, since tokens are no eight-bit values.

    Source: Li et al., "Autoregressive image generation without vector quantization", arXiv 2406.11838, section 3;
    bound: Nichol and Dhariwal, arXiv 2102.09672, equations 4 to 7 and 16.
    """

    Config = MaskedAutoregressionConfig
    student_type = MaskedAutoregressive

    student: MaskedAutoregressive  # type: ignore[assignment]
    table: Tensor

    def __init__(self, config, student, teacher=None):
        super().__init__(config, student, teacher)
        chain = GaussianChain()
        sigma = (1 - chain.abar).sqrt()
        slope = chain.beta / (sigma * (1 - chain.beta).sqrt())  # of the mean over the noise
        table = torch.stack((chain.abar.sqrt(), sigma, slope, chain.log_beta, chain.log_posterior))
        self.register_buffer("table", table, persistent=False)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c = self.config
        condition, _ = drop_condition(batch, rng, c.condition_dropout)
        tokens = self.student.tokens(batch.x0)
        order = rng.uniform((self.student.length,), dtype=torch.float64).argsort(1)
        masked, visible = order.split_with_sizes(self._counts(shared(batch, rng)), dim=1)
        z = self.student.outputs(tokens, visible, masked, condition["class_labels"])
        x0 = tokens.gather(1, masked[..., None].expand(-1, -1, tokens.shape[2]))
        mse, bound = self._head_loss(x0, z, rng)
        yield Loss(mse + bound, {"mse": mse, "bound": bound})

    def _counts(self, rng: ItemRNG) -> list[int]:
        """How many tokens are masked, and how many are not."""
        c, length = self.config, self.student.length
        low, high = _normal_cdf(c)
        u = low + (high - low) * rng.uniform(dtype=torch.float64).item()
        ratio = c.mask_mean + c.mask_std * torch.special.ndtri(torch.tensor(u, dtype=torch.float64)).item()
        masked = min(length, math.ceil(length * min(max(ratio, c.mask_min), 1)))
        return [masked, length - masked]

    def _head_loss(self, x0: Tensor, z: Tensor, rng: ItemRNG) -> tuple[Tensor, Tensor]:
        """Error of the noise, and the bound, of tokens ``(B, m, D)`` under ``z`` ``(B, m, E)``."""
        copies, (_, m, d) = self.config.diffusion_batch_mul, x0.shape
        step = rng.integers(TRAIN_STEPS, (copies, m))
        epsilon = rng.normal((copies, m, d), dtype=x0.dtype)
        alpha, sigma, slope, log_beta, log_posterior = self.table.to(x0.dtype)[:, step, None]
        predicted, logits = self.student.network.head(alpha * x0[:, None] + sigma * epsilon, step, z[:, None])
        error = (predicted - epsilon).to(torch.promote_types(predicted.dtype, torch.float32))
        log_var = log_variance(logits.to(error.dtype), log_beta, log_posterior)
        # The means differ as the noises do. The chain's first step has a density in place of a divergence.
        difference = (slope * error.detach()).square() * (-log_var).exp()
        first = step[..., None] == 0
        true = torch.where(first, -math.log(2 * math.pi), 1 + log_posterior - (log_posterior - log_var).exp())
        bound = (log_var - true + difference) / (2 * math.log(2))
        return error.square().mean(), bound.mean()


def _normal_cdf(c: MaskedAutoregressionConfig) -> tuple[float, float]:
    """The normal's cumulative probability at either end of the interval."""
    low, high = (math.erf((x - c.mask_mean) / (c.mask_std * math.sqrt(2))) / 2 + 0.5 for x in (c.mask_min, 1.0))
    return low, high
