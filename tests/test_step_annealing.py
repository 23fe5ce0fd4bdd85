"""Fewer and fewer head steps: the published tables, budgets, and what is refused."""

import re

import pytest

from genkit.gaussian_chain import GaussianChain
from genkit.masked_autoregressive import reveal_counts
from genkit.pipelines.by_name import parse_steps
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


def test_published_costs():
    """A token a step, and 100 steps of the head each: 25,600 calls; DiSA's are some fifteen times fewer."""
    assert reveal_counts(256, 256) == [1] * 256
    whole, annealed = StepAnnealer(100, kind="constant").total(256), StepAnnealer(50, 5).total(64)
    assert whole == 25_600 and 14 < whole / annealed < 16


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget, steps", [(1733, 64), (1700, 64), (320, 64), (123, 10), (50, 1), (10**6, 7)])
def test_a_budget_is_used_up(kind, budget, steps):
    """By the largest ``hi``: one more would exceed it."""
    annealer = StepAnnealer(budget=budget, kind=kind)
    hi, lo = annealer.ends(steps)
    more = StepAnnealer(hi + 1, None if kind == "constant" else lo, kind)
    assert annealer.total(steps) <= budget < more.total(steps)
    assert lo == (hi if kind == "constant" else 5)
    assert table(annealer, steps) == table(StepAnnealer(hi, lo, kind), steps)


def test_budgets_of_the_published_settings():
    """64 steps of 50 to 5."""
    for kind, budget in (("linear", 1733), ("cosine", 1729), ("two_stage", 1760)):
        assert StepAnnealer(lo=5, kind=kind, budget=budget).ends(64) == (50, 5)
        assert StepAnnealer(lo=5, kind=kind, budget=budget - 1).ends(64) == (49, 5)


def test_a_budget_follows_the_number_of_steps():
    annealer = StepAnnealer(budget=100, lo=2)
    assert [annealer.total(steps) <= 100 for steps in (1, 4, 10, 50)] == [True] * 4
    assert [annealer.ends(steps) for steps in (1, 50)] == [(100, 2), (2, 2)]


def test_one_number():
    assert StepAnnealer(20, kind="constant") == StepAnnealer(20, 20, "constant")
    assert StepAnnealer(kind="constant", budget=100).ends(16) == (6, 6)
    assert StepAnnealer() == StepAnnealer(50, 5, "linear") and StepAnnealer().ends(7) == (50, 5)


def test_as_a_command_line_writes_it():
    said = ["linear:hi=50,lo=5", "cosine:budget=400,lo=3", "constant:hi=9,lo=9", "constant:budget=400"]
    assert [str(parse_steps(text)) for text in said] == said


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: StepAnnealer(5, 50), "lo=50, hi=5: accepted are 1 <= lo <= hi"),
        (lambda: StepAnnealer(5, 0), "lo=0, hi=5: accepted are 1 <= lo <= hi"),
        (lambda: StepAnnealer(50, 5, "lineer"), "kind='lineer' is not known; did you mean 'linear'"),
        (lambda: StepAnnealer(50, 5, "constant"), "kind='constant' has one number of steps"),
        (lambda: StepAnnealer(20.5, 5), "hi=20.5: must be an integer"),
        (lambda: StepAnnealer(20, "5"), "lo='5': must be an integer"),
        (lambda: StepAnnealer(budget=100.5), "budget=100.5: must be an integer"),
        (lambda: StepAnnealer(budget=0), "budget=0: must be at least 1"),
        (lambda: StepAnnealer(budget=100, lo=0), "lo=0: must be at least 1"),
        (lambda: StepAnnealer(50, budget=100), "hi=50, budget=100: the budget decides hi; give one of the two"),
        (
            lambda: StepAnnealer(lo=5, kind="constant", budget=100),
            "lo=5, budget=100: the budget decides lo; give one of the two",
        ),
        (lambda: StepAnnealer(budget=100).ends(2.5), "num_ar_steps=2.5: must be an integer"),
        (lambda: StepAnnealer()(64, 64), "k=64: accepted are 0 to 63, there are 64 steps"),
        (lambda: StepAnnealer()(-1, 64), "k=-1: accepted are 0 to 63"),
        (lambda: StepAnnealer(budget=319).total(64), "budget=319: 64 steps of at least lo=5 take 320"),
        (lambda: StepAnnealer(budget=63, kind="constant").total(64), "budget=63: 64 steps of at least 1 take 64"),
        (lambda: StepAnnealer().ends(0), "num_ar_steps=0: must be at least 1"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()
