"""Fewer and fewer head steps: the published tables, budgets, and what is refused."""

import re

import pytest

from genkit.gaussian_chain import GaussianChain
from genkit.masked_autoregressive import reveal_counts
from genkit.step_annealing import KINDS, StepAnnealer


def table(annealer: StepAnnealer, steps: int) -> list[int]:
    return [annealer(k, steps) for k in range(steps)]


@pytest.mark.parametrize(
    "hi, lo, kind, calls, tokens, merged_calls, merged_tokens",
    [
        (50, 5, "linear", 1733, 5372, 1681, 5246),
        (50, 5, "cosine", 1729, 5015, 1674, 4891),
        (50, 5, "two_stage", 1760, 4655, 1696, 4505),
        (25, 5, "linear", 929, 3019, None, None),
        (100, 5, "linear", 3329, 10037, None, None),
        (100, 100, "constant", 6400, 25600, None, None),
    ],
)
def test_head_calls_of_64_steps_on_256_tokens(hi, lo, kind, calls, tokens, merged_calls, merged_tokens):
    annealer, counts = StepAnnealer(hi, lo, kind), reveal_counts(256, 64)
    steps = table(annealer, 64)
    assert sum(steps) == annealer.total(64) == calls
    assert sum(t * n for t, n in zip(steps, counts, strict=True)) == tokens
    if merged_calls is not None:  # where the timesteps above 950 are one
        merged = [len(GaussianChain(t, 950)) for t in steps]
        assert sum(merged) == merged_calls
        assert sum(t * n for t, n in zip(merged, counts, strict=True)) == merged_tokens


@pytest.mark.parametrize(
    "hi, lo, expected", [(25, 15, [25, 22, 20, 17, 15]), (50, 15, [50, 38, 26, 15])], ids=["FlowAR", "xAR"]
)
def test_tables_of_other_hosts(hi, lo, expected):
    assert table(StepAnnealer(hi, lo), len(expected)) == expected


def test_kinds_by_hand():
    assert table(StepAnnealer(10, 2, "cosine"), 5) == [10, 8, 6, 3, 2]  # 8 (1 + cos(3 pi / 4)) / 2 = 1.17
    assert table(StepAnnealer(10, 2, "two_stage"), 5) == [10, 10, 2, 2, 2]
    assert table(StepAnnealer(10, 2, "two_stage"), 4) == [10, 10, 2, 2]
    assert table(StepAnnealer(7, 7, "constant"), 3) == [7, 7, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_falls_from_hi_to_lo(kind):
    lo = 40 if kind == "constant" else 3
    for steps in (2, 3, 17, 64):
        got = table(StepAnnealer(40, lo, kind), steps)
        assert got[0] == 40 and got[-1] == lo and got == sorted(got, reverse=True)
    assert table(StepAnnealer(40, lo, kind), 1) == [40]
    assert table(StepAnnealer(9, 9, kind), 5) == [9] * 5


@pytest.mark.parametrize("kind", ["linear", "cosine", "two_stage"])
@pytest.mark.parametrize("budget, steps", [(1733, 64), (1700, 64), (320, 64), (123, 10), (50, 1), (10**6, 7)])
def test_a_budget_is_used_up(kind, budget, steps):
    annealer = StepAnnealer.within(budget, steps, lo=5, kind=kind)
    assert annealer.total(steps) <= budget < StepAnnealer(annealer.hi + 1, 5, kind).total(steps)


def test_budgets_of_one_number():
    assert StepAnnealer.within(100, 16, lo=6, kind="constant") == StepAnnealer(6, 6, "constant")
    assert StepAnnealer.within(50, 10, lo=5) == StepAnnealer(5, 5)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: StepAnnealer(5, 50), "lo=50, hi=5: accepted are 1 <= lo <= hi"),
        (lambda: StepAnnealer(5, 0), "lo=0, hi=5: accepted are 1 <= lo <= hi"),
        (lambda: StepAnnealer(50, 5, "lineer"), "kind='lineer' is not known; did you mean 'linear'"),
        (lambda: StepAnnealer(50, 5, "constant"), "kind='constant' has one number of steps"),
        (lambda: StepAnnealer(20.5, 5), "hi=20.5: must be an integer"),
        (lambda: StepAnnealer(20, "5"), "lo='5': must be an integer"),
        (lambda: StepAnnealer.within(100.5, 10), "budget=100.5: must be an integer"),
        (lambda: StepAnnealer.within(100, 2.5), "num_ar_steps=2.5: must be an integer"),
        (lambda: StepAnnealer()(64, 64), "k=64: accepted are 0 to 63, there are 64 steps"),
        (lambda: StepAnnealer()(-1, 64), "k=-1: accepted are 0 to 63"),
        (lambda: StepAnnealer.within(319, 64, lo=5), "budget=319: 64 steps of at least lo=5 take 320"),
        (lambda: StepAnnealer.within(10, 0), "num_ar_steps=0: must be at least 1"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()
