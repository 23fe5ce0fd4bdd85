"""How many diffusion steps each step of an autoregressive model with a diffusion head gets."""

import math
from dataclasses import dataclass

from genkit.checks import check_integer
from genkit.registry import unknown

KINDS = ("linear", "cosine", "two_stage", "constant")


@dataclass(frozen=True)
class StepAnnealer:
    """``annealer(k, K) = lo + floor(f(k) (hi - lo))`` head steps at autoregressive step ``k`` of ``K``.

    ``f`` falls from 1 to 0 with ``U = K - 1``: ``(U - k) / U`` (``linear``), ``(cos(pi k / U) + 1) / 2`` (``cosine``),
    1 for ``k < U / 2`` and then 0 (``two_stage``); with one step it is 1. Late tokens are nearly determined by those
    before them, and need few steps. Needs no training, and serves any host: hand what it says to the head's sampler.

    Args:
        hi: steps of the head at first.
        lo: steps of the head at last; ``constant`` has one number, ``lo = hi``.
        kind: one of the above, or ``constant``.

    Raises:
        ValueError: no steps or no whole ones, ``lo > hi``, an unknown kind, two numbers for ``constant``.

    Source: Zhao et al., "DiSA: Diffusion step annealing in autoregressive image generation", arXiv 2505.20297.
    """

    hi: int = 50
    lo: int = 5
    kind: str = "linear"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(unknown("kind", self.kind, KINDS))
        check_integer("hi", self.hi)
        check_integer("lo", self.lo)
        if not 1 <= self.lo <= self.hi:
            raise ValueError(f"lo={self.lo}, hi={self.hi}: accepted are 1 <= lo <= hi, since steps are to fall")
        if self.kind == "constant" and self.lo != self.hi:
            raise ValueError(f"lo={self.lo}, hi={self.hi}: kind='constant' has one number of steps, so they must agree")

    def __str__(self) -> str:
        """As a command line writes it: ``linear:hi=50,lo=5``."""
        return f"{self.kind}:hi={self.hi},lo={self.lo}"

    def __call__(self, k: int, num_ar_steps: int) -> int:
        """Steps of the head at step ``k`` of ``num_ar_steps``.

        Raises:
            ValueError: ``k`` out of range.
        """
        last, span = num_ar_steps - 1, self.hi - self.lo
        if not 0 <= k <= last:
            raise ValueError(f"k={k}: accepted are 0 to {last}, there are {num_ar_steps} steps")
        if last == 0 or span == 0:
            return self.hi
        if self.kind == "linear":
            return self.lo + (last - k) * span // last
        if self.kind == "cosine":
            return self.lo + int((math.cos(math.pi * k / last) + 1) / 2 * span)
        return self.hi if 2 * k < last else self.lo

    def total(self, num_ar_steps: int) -> int:
        """Calls of the head, one after the other, in a whole run."""
        return sum(self(k, num_ar_steps) for k in range(num_ar_steps))

    @classmethod
    def within(cls, budget: int, num_ar_steps: int, *, lo: int = 5, kind: str = "linear") -> "StepAnnealer":
        """The one with the largest ``hi`` of which all steps together are at most ``budget``.

        ``constant`` spends it evenly and has no ``lo`` of its own: give ``lo = budget // num_ar_steps``.

        Raises:
            ValueError: less than ``lo`` steps each, or no steps.
        """
        check_integer("budget", budget)
        check_integer("num_ar_steps", num_ar_steps)
        if num_ar_steps < 1:
            raise ValueError(f"num_ar_steps={num_ar_steps}: must be at least 1")
        least = cls(lo, lo, kind)
        if budget < least.total(num_ar_steps):
            raise ValueError(
                f"budget={budget}: {num_ar_steps} steps of at least lo={lo} take {least.total(num_ar_steps)}"
            )
        if kind == "constant":
            return least
        best, beyond = lo, budget + 1  # one step takes hi alone
        while beyond - best > 1:
            middle = (best + beyond) // 2
            fits = cls(middle, lo, kind).total(num_ar_steps) <= budget
            best, beyond = (middle, beyond) if fits else (best, middle)
        return cls(best, lo, kind)
