"""Log-weights of particles, a group of them a prompt."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genkit.feynman_kac.resampling import inverse_cdf, resample
from genkit.rng import ItemRNG


@dataclass(frozen=True)
class LogWeights:
    """Log-weights of ``K`` particles for each of ``N`` prompts; particle ``k`` of group ``n`` is sample ``n K + k``.

    Everything is on the CPU and in float64, wherever the samples are. A group never looks at another.

    Args:
        values: ``(N, K)``, unnormalised, in nats; minus infinity for a dead particle.
        collected: ``(N,)``, log-evidence that resampling has taken out of ``values``; NaN once a group was resampled
            without residual weights from other than its weights.
        roots: ``(N, K)``, int64: which particle of the start each one descends from.
        memory: ``(N, K, M)``, what a particle method remembers of each particle from step to step.

    Raises:
        ValueError: shapes that do not fit, or a group in which every particle is dead.
    """

    values: Tensor
    collected: Tensor
    roots: Tensor
    memory: Tensor

    def __post_init__(self):
        shape = tuple(self.values.shape)
        if len(shape) != 2 or shape[1] < 1 or self.collected.shape != shape[:1]:
            raise ValueError(
                f"values must be (groups, particles) and collected (groups,), got {shape} and "
                f"{tuple(self.collected.shape)}"
            )
        if self.roots.shape != shape or self.memory.shape[:2] != shape:
            raise ValueError(
                f"roots and memory must be {shape} and {shape} + (M,), got {tuple(self.roots.shape)}, "
                f"{tuple(self.memory.shape)}"
            )
        alive = self.values.isfinite().any(1)
        if not bool(alive.all()):
            raise ValueError(
                f"log-weights: no particle of group {int((~alive).nonzero()[0])} has a finite weight; the scores or "
                "rewards behind them are not finite"
            )

    @classmethod
    def equal(cls, groups: int, particles: int, memory: int = 0) -> "LogWeights":
        """The weights at the start: all 0, every particle its own root."""
        zeros = torch.zeros(groups, particles, dtype=torch.float64)
        roots = torch.arange(particles).expand(groups, particles)
        return cls(zeros, zeros.new_zeros(groups), roots, zeros.new_zeros(groups, particles, memory))

    # -- what they say --------------------------------------------------------------------------------------------

    @property
    def normalised(self) -> Tensor:
        """``W = softmax(values)`` within each group, ``(N, K)``."""
        return self.values.softmax(1)

    @property
    def ess(self) -> Tensor:
        """Effective sample size ``1 / sum W^2``, from 1 to ``K``, shape ``(N,)``."""
        return 1 / self.normalised.square().sum(1)

    @property
    def entropy(self) -> Tensor:
        """``-sum W log W / log K`` in [0, 1], shape ``(N,)``; 1 for a single particle."""
        count = self.values.shape[1]
        return torch.special.entr(self.normalised).sum(1) / math.log(count) if count > 1 else self.ess

    @property
    def log_z(self) -> Tensor:
        """``log Z``, the logarithm of the estimated normalising constant (in mean unbiased itself), shape ``(N,)``."""
        return self.collected + self.values.logsumexp(1) - math.log(self.values.shape[1])

    @property
    def distinct_roots(self) -> Tensor:
        """How many particles of the start have descendants, shape ``(N,)``."""
        ordered = self.roots.sort(1).values
        return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)

    def choose(self, rng: ItemRNG) -> Tensor:
        """One particle a group, drawn by weight: indices into the samples, shape ``(N,)``."""
        first = inverse_cdf(self.normalised, rng.uniform((1,), dtype=torch.float64)).squeeze(1)
        return first + torch.arange(len(first)) * self.values.shape[1]

    # -- what happens to them -------------------------------------------------------------------------------------

    def add(self, increment: Tensor) -> "LogWeights":
        """``values + increment`` ``(N, K)``; a particle whose weight is then not finite is dead.

        Raises:
            ValueError: that leaves a group without particles.
        """
        values = self.values + increment
        return replace(self, values=values.where(values.isfinite(), -math.inf))

    def resample(
        self,
        resampler: str,
        rng: ItemRNG,
        *,
        where: Tensor | None = None,
        temperature: Tensor | None = None,
        modulation: Tensor | None = None,
        residual: bool = True,
    ) -> tuple["LogWeights", Tensor]:
        """The next generation and its ancestors ``(N, K)``, int64, drawn from ``P = softmax((values + l)/T)``.

        A survivor ``a`` carries ``log W_a - log P_a``, which is 0 where ``P = W``: the weighted particles and ``log_z``
        mean the same before and after.

        Args:
            resampler: see :func:`genkit.feynman_kac.resampling.resample`.
            rng: one row a group; as many numbers are drawn whatever ``where`` says.
            where: ``(N,)`` bool, the groups to resample; all by default.
            temperature: ``T >= 1``, ``(N,)``; 1 by default.
            modulation: ``l``, ``(N, K)``, what is known of the particles' future; 0 by default.
            residual: ``False`` lets survivors carry 0 though ``P`` is not ``W``; ``log_z`` is NaN from then on.

        Raises:
            ValueError: an unknown resampler, or a modulation that is not finite.
        """
        n, count = self.values.shape
        if modulation is not None and not bool(modulation.isfinite().all()):
            raise ValueError("modulation must be finite: a living particle that can never be drawn would bias the rest")
        where = torch.ones(n, dtype=torch.bool) if where is None else where
        logits = self.values if modulation is None else self.values + modulation
        if temperature is not None:
            logits = logits / temperature[:, None]
        index = resample(resampler, logits.softmax(1), rng)
        index = torch.where(where[:, None], index, torch.arange(count))
        carried = (self.values.log_softmax(1) - logits.log_softmax(1)).gather(1, index)
        evidence = self.log_z
        if not residual:
            plain = (carried == 0).all(1) & (logits.softmax(1) == self.normalised).all(1)
            evidence, carried = evidence.where(plain, math.nan), torch.zeros_like(carried)
        rows = index + torch.arange(n)[:, None] * count
        moved = self.gather(rows.flatten())
        return (
            replace(
                moved,
                values=carried.where(where[:, None], self.values),
                collected=evidence.where(where, self.collected),
            ),
            index,
        )

    def gather(self, index: Tensor) -> "LogWeights":
        """The weights with those of sample ``index[j]`` at sample ``j``; whole groups stay groups.

        Raises:
            ValueError: a group would mix particles of different prompts.
        """
        count = self.values.shape[1]
        index = index.cpu()
        if not len(index) or len(index) % count:
            raise ValueError(f"index has {len(index)} entries, which are no groups of num_particles={count}")
        group = (index // count).view(-1, count)
        if not bool((group == group[:, :1]).all()):
            raise ValueError(f"index mixes prompts in a group of num_particles={count}: each group must stay its own")
        n, m = self.values.shape, self.memory.shape[-1]
        rows = index.view(-1, count)
        return LogWeights(
            self.values.reshape(n.numel())[rows],
            self.collected[group[:, 0]],
            self.roots.reshape(n.numel())[rows],
            self.memory.reshape(n.numel(), m)[rows],
        )
