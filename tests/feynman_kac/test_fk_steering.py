"""Steering by a reward of the predicted clean sample: its target, whatever the potential and the look-ahead."""

import math

import pytest
import torch

from genkit.denoisers import Condition
from genkit.feynman_kac import EntropicAnnealing, FKSteering
from genkit.guidance import CFG
from tests.feynman_kac.targets import MIXED_U, UNIT, WIDE, either, grid, run, scheduler_on

GROUPS, K = 1500, 8
SLOPE = 0.8


def reward(x):
    return x[:, 0]


@pytest.fixture(scope="module")
def plain():
    """Many plain samples of the same chain: the truth is their reweighted mean, free of the error of its steps."""
    x = run(MIXED_U.denoiser(), scheduler_on(grid(10, 1e-2, 16)), None, samples=200000, seed=7).x[:, 0]
    w = (SLOPE * x).exp()
    return w.mean().item(), ((w * x).mean() / w.mean()).item()


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(potential="max"),
        dict(potential="sum", reward_interval=5),
        dict(reward_interval=4, resampler="ssp"),
        dict(lookahead_steps=1),
        dict(lookahead_steps=4, ess_threshold=1.0),
        dict(annealing=EntropicAnnealing("entropy"), ess_threshold=0.9),
        dict(annealing=EntropicAnnealing("base", ess_threshold=1.0, early_phase=1.0), lookahead_steps=2),
    ],
    ids=lambda s: ",".join(s) or "plain",
)
def test_unbiased(settings, plain):
    """``E[Z] = E[exp(lambda r)]`` and ``E[Z sum W x] = E[exp(lambda r) x]`` over groups of 8, within 4 errors."""
    particles = FKSteering(K, reward=reward, reward_scale=SLOPE, **settings)
    state = run(MIXED_U.denoiser(), scheduler_on(grid(10, 1e-2, 16)), particles, samples=GROUPS * K)
    assert bool((particles.stats()["ancestors"] != torch.arange(K)).any())
    z = state.log_weights.log_z.exp()
    mean = (state.log_weights.normalised * state.x.view(GROUPS, K)).sum(1)
    for estimate, truth in ((z, plain[0]), (z * mean, plain[0] * plain[1])):
        error = estimate.std().item() / math.sqrt(GROUPS) + 0.004 * abs(truth)  # and that of the plain samples
        assert abs(estimate.mean().item() - truth) <= 4 * error


def test_steering_earns_more_reward_than_the_same_particles_unweighted():
    settings = dict(samples=400, seed=3)
    times = grid(10, 1e-2, 16)
    steered = run(MIXED_U.denoiser(), scheduler_on(times), FKSteering(4, reward=reward, reward_scale=3.0), **settings)
    chosen = (steered.log_weights.normalised * steered.x.view(-1, 4)).sum(1)
    free = run(MIXED_U.denoiser(), scheduler_on(times), None, **settings).x
    best = run(MIXED_U.denoiser(), scheduler_on(times), FKSteering(4, reward=reward, ess_threshold=0), **settings)
    assert chosen.mean() > free.mean() + 1.0 and chosen.mean() > best.x.view(-1, 4).mean() + 1.0


def test_the_reward_is_asked_as_often_as_said():
    calls = []

    def counting(x):
        calls.append(len(x))
        return x[:, 0]

    times = grid(10, 1e-2, 16)
    run(MIXED_U.denoiser(), scheduler_on(times), FKSteering(4, reward=counting), samples=8)
    assert len(calls) == 15  # every evaluation but the first
    calls.clear()
    run(MIXED_U.denoiser(), scheduler_on(times), FKSteering(4, reward=counting, reward_interval=6), samples=8)
    assert len(calls) == 3  # evaluations 6, 12 and the last, 15
    calls.clear()
    run(MIXED_U.denoiser(), scheduler_on(times[:1]), FKSteering(4, reward=counting), samples=8)
    assert len(calls) == 1


def test_look_ahead_goes_through_the_guider_and_is_counted():
    n = 32
    given = Condition({"given": torch.ones(n, dtype=torch.int64)}, {"given": torch.zeros(n, dtype=torch.int64)})
    calls = {}
    for ahead in (0, 2):
        denoiser = either(UNIT, WIDE)
        particles = FKSteering(8, reward=reward, reward_scale=2.0, lookahead_steps=ahead, ess_threshold=1.0)
        run(
            denoiser,
            scheduler_on(grid(10, 1e-2, 6)),
            particles,
            samples=n,
            guider=CFG(guidance_scale=2.0),
            given=given,
        )
        calls[ahead] = denoiser.calls
    # evaluations 1 to 4 resample; two steps on from each, but for the last of them, which has one
    assert calls == {0: 12, 2: 12 + 2 * (2 + 2 + 2 + 1)}


def test_a_look_ahead_without_finite_reward_is_left_out():
    """The reward fails on every point that is looked ahead to: the run is the one without look-ahead."""
    times = grid(10, 1e-2, 16)
    settings = dict(reward_scale=3.0, ess_threshold=1.0)

    class Broken(FKSteering):
        """Makes the reward fail while it looks ahead."""

        def look_ahead(self, state, memory):
            known = self._rewards(state.guided)
            self._rewards = lambda guided: known if guided is state.guided else known * math.nan
            gain = super().look_ahead(state, memory)
            del self._rewards
            return gain

    one = run(MIXED_U.denoiser(), scheduler_on(times), FKSteering(8, reward=reward, **settings), samples=64)
    two = run(
        MIXED_U.denoiser(), scheduler_on(times), Broken(8, reward=reward, lookahead_steps=1, **settings), samples=64
    )
    assert torch.equal(one.x, two.x) and torch.equal(one.log_weights.values, two.log_weights.values)
