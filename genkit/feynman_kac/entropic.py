"""Entropic annealing: draw ancestors from flattened weights while few particles carry them and it is early."""

import torch
from torch import Tensor

from genkit.feynman_kac.log_weights import LogWeights
from genkit.guidance.base import check_range
from genkit.registry import unknown

SCHEDULES = ("ess", "entropy", "base")


class EntropicAnnealing:
    """Resample from ``softmax(log w / T)`` with ``T > 1`` where early weights are over-confident.

    With ``e = ESS/K``, ``H`` the entropy of the weights over ``log K`` and ``p`` in (0, 1] the progress::

        ess       T = max(1, (1 - p) / e)
        entropy   T = max(1, 1 / (H + (1 - H) p))
        base      T = max(1, 2 - p)

    while ``e < ess_threshold`` and ``p < early_phase``, else ``T = 1``. Survivors carry ``log W - log P``, which keeps
    every weighted estimate unbiased. It cannot rescue particles whose weights are apart by far more than ``log K``.

    Args:
        schedule: ``ess``, ``entropy`` or ``base``.
        ess_threshold, early_phase: in [0, 1]; when it is on.
        residual: ``False`` lets survivors carry 0, as published: biased towards exploration, and ``log_z`` is NaN.

    Raises:
        ValueError: a setting out of range.

    Source: Giannone et al., "Mitigating premature exploitation in particle-based Monte Carlo for inference-time
    scaling", arXiv 2510.05825; the residual weights are not in the paper.
    """

    def __init__(
        self,
        schedule: str = "ess",
        *,
        ess_threshold: float = 0.5,
        early_phase: float = 0.5,
        residual: bool = True,
    ):
        if schedule not in SCHEDULES:
            raise ValueError(unknown("schedule", schedule, SCHEDULES))
        check_range("ess_threshold", ess_threshold, 0, 1)
        check_range("early_phase", early_phase, 0, 1)
        self.schedule = schedule
        self.ess_threshold = ess_threshold
        self.early_phase = early_phase
        self.residual = residual

    def temperature(self, log_weights: LogWeights, progress: float) -> Tensor:
        """``T``, shape ``(N,)``, of the groups at ``progress`` ``p``."""
        share = log_weights.ess / log_weights.values.shape[1]
        if self.schedule == "ess":
            wanted = (1 - progress) / share
        elif self.schedule == "entropy":
            entropy = log_weights.entropy
            wanted = 1 / (entropy + (1 - entropy) * progress)
        else:
            wanted = torch.full_like(share, 2 - progress)
        on = (share < self.ess_threshold) & (progress < self.early_phase)
        return wanted.clamp(min=1).where(on, torch.ones_like(wanted))
