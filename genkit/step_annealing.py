"""How many diffusion steps each step of an autoregressive model with a diffusion head gets."""

import math
from dataclasses import dataclass
from functools import lru_cache

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
        hi: steps of the head at first, by default 50.
        lo: steps of the head at last, by default 5; ``constant`` has one number, ``lo = hi``.
        kind: one of the above, or ``constant``.
        budget: in place of ``hi``: all steps of a run together. ``hi`` is then the largest of which a run takes no
            more; ``constant``, which has no ``lo`` either, spends it evenly.

    Raises:
        ValueError: no steps or no whole ones, ``lo > hi``, an unknown kind, two numbers for ``constant``, ``hi`` beside
            a budget.

    Source: Zhao et al., "DiSA: Diffusion step annealing in autoregressive image generation", arXiv 2505.20297.
    """

    hi: int | None = None
    lo: int | None = None
    kind: str = "linear"
    budget: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(unknown("kind", self.kind, KINDS))
        given = {name: value for name in ("hi", "lo", "budget") if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            check_integer(name, value)
        constant = self.kind == "constant"
        if self.budget is None:
            hi = given.setdefault("hi", 50)
            lo = given.setdefault("lo", hi if constant else 5)
            if not 1 <= lo <= hi:
                raise ValueError(f"lo={lo}, hi={hi}: accepted are 1 <= lo <= hi, since steps are to fall")
            if constant and lo != hi:
                raise ValueError(f"lo={lo}, hi={hi}: kind='constant' has one number of steps, so they must agree")
        else:
            for name in ("hi", "lo") if constant else ("hi",):
                if name in given:
                    raise ValueError(
                        f"{name}={given[name]}, budget={self.budget}: the budget decides {name}; give one of the two"
                    )
            if self.budget < 1:
                raise ValueError(f"budget={self.budget}: must be at least 1")
            if not constant and given.setdefault("lo", 5) < 1:
                raise ValueError(f"lo={self.lo}: must be at least 1")
        for name, value in given.items():
            object.__setattr__(self, name, value)  # a frozen dataclass has no other way

    def __str__(self) -> str:
        """As a command line writes it: ``linear:hi=50,lo=5``, ``linear:budget=1733,lo=5``."""
        told = {name: value for name in ("budget", "hi", "lo") if (value := getattr(self, name)) is not None}
        return f"{self.kind}:" + ",".join(f"{name}={value}" for name, value in told.items())

    def __call__(self, k: int, num_ar_steps: int) -> int:
        """Steps of the head at step ``k`` of ``num_ar_steps``.

        Raises:
            ValueError: ``k`` out of range; a budget that is too small for so many steps.
        """
        last = num_ar_steps - 1
        if not 0 <= k <= last:
            raise ValueError(f"k={k}: accepted are 0 to {last}, there are {num_ar_steps} steps")
        hi, lo = self.ends(num_ar_steps)
        span = hi - lo
        if last == 0 or span == 0:
            return hi
        if self.kind == "linear":
            return lo + (last - k) * span // last
        if self.kind == "cosine":
            return lo + int((math.cos(math.pi * k / last) + 1) / 2 * span)
        return hi if 2 * k < last else lo

    def total(self, num_ar_steps: int) -> int:
        """Calls of the head, one after the other, in a whole run."""
        return sum(self(k, num_ar_steps) for k in range(num_ar_steps))

    def ends(self, num_ar_steps: int) -> tuple[int, int]:
        """``hi`` and ``lo`` in a run of ``num_ar_steps``: what a budget makes them, or as they are.

        Raises:
            ValueError: no steps, or a budget of less than ``lo`` for each.
        """
        check_integer("num_ar_steps", num_ar_steps)
        if num_ar_steps < 1:
            raise ValueError(f"num_ar_steps={num_ar_steps}: must be at least 1")
        if self.hi is not None and self.lo is not None:
            return self.hi, self.lo
        assert self.budget is not None
        return _within(self.budget, num_ar_steps, self.lo, self.kind)


@lru_cache
def _within(budget: int, num_ar_steps: int, lo: int | None, kind: str) -> tuple[int, int]:
    """``hi`` and ``lo``."""
    least = lo or 1
    if budget < least * num_ar_steps:
        raise ValueError(
            f"budget={budget}: {num_ar_steps} steps of at least {least if lo is None else f'lo={lo}'} take "
            f"{least * num_ar_steps}"
        )
    if kind == "constant":
        return budget // num_ar_steps, budget // num_ar_steps
    best, beyond = least, budget + 1  # one step takes hi alone
    while beyond - best > 1:
        middle = (best + beyond) // 2
        fits = StepAnnealer(middle, lo, kind).total(num_ar_steps) <= budget
        best, beyond = (middle, beyond) if fits else (best, middle)
    return best, least


def as_written(steps: int | StepAnnealer | None) -> int | str | None:
    """Steps as a command line and JSON have them."""
    return str(steps) if isinstance(steps, StepAnnealer) else steps
