"""The chain of a diffusion head: its numbers, and what it draws where the head is known in closed form."""

import math
import re

import pytest
import torch

from genkit.gaussian_chain import GaussianChain, log_variance
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer


def test_the_whole_chain_is_the_cosine_schedule():
    chain = GaussianChain()
    assert chain.timesteps == list(range(1000))
    assert chain.abar[[950, 980, 999]].tolist() == pytest.approx([0.0058, 8.8e-4, 2.4e-9], rel=0.02)
    assert chain.beta.max().item() == pytest.approx(0.999) and (chain.beta > 0).all()

    def level(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    assert chain.abar[499].item() == pytest.approx(level(0.5) / level(0), rel=1e-12)


@pytest.mark.parametrize("num_steps, kept", [(50, 48), (25, 24), (100, 96), (5, 5), (1, 1)])
def test_steps_above_the_largest_timestep_become_one(num_steps, kept):
    chain = GaussianChain(num_steps, 950)
    assert len(chain) == kept and chain.timesteps[-1] == 950
    assert chain.timesteps[:-1] == [round(999 * j / (num_steps - 1)) for j in range(kept - 1)]


def test_spaced_steps_go_from_the_first_to_the_last():
    chain = GaussianChain(5)
    assert chain.timesteps == [0, 250, 500, 749, 999]
    whole = GaussianChain().abar[chain.timesteps]
    torch.testing.assert_close(chain.abar, whole, rtol=0, atol=0)
    torch.testing.assert_close((1 - chain.beta).cumprod(0), whole, rtol=1e-9, atol=0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), whole[:-1]))
    posterior = (1 - whole / before) * (1 - before) / (1 - whole)
    torch.testing.assert_close(chain.log_posterior[1:], posterior[1:].log())
    assert chain.log_posterior[0] == chain.log_posterior[1]  # its own is that of zero


def test_the_variance_is_between_those_of_beta_and_of_the_posterior():
    logits = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(log_variance(logits, -1.0, -3.0), torch.tensor([-3.0, -2.0, -1.0]))


def exact_head(chain, mean, std, logit):
    """Noise of ``N(mean, std^2)``, and one variance logit for all."""

    def head(x, timestep):
        abar = chain.abar[chain.timesteps.index(timestep)].item()
        epsilon = math.sqrt(1 - abar) * (x - math.sqrt(abar) * mean) / (abar * std**2 + 1 - abar)
        return epsilon, torch.full_like(x, logit)

    return head


def moments(chain, mean, std, logit) -> tuple[float, float]:
    """Mean and standard deviation of what the chain draws: each step is affine in a Gaussian."""
    m, v = 0.0, 1.0
    for j in reversed(range(len(chain))):
        abar, beta = chain.abar[j].item(), chain.beta[j].item()
        gain = beta / (abar * std**2 + 1 - abar)  # of the noise, times beta / sqrt(1 - abar)
        m = (m - gain * (m - math.sqrt(abar) * mean)) / math.sqrt(1 - beta)
        v = v * (1 - gain) ** 2 / (1 - beta)
        if j:
            r = (logit + 1) / 2
            before = chain.abar[j - 1].item()
            v += beta**r * (beta * (1 - before) / (1 - abar)) ** (1 - r)
    return m, math.sqrt(v)


def distance(num_steps: int, std: float) -> float:
    """Squared Wasserstein distance of what is drawn from ``N(1, std^2)``, with the posterior's variance.

    That is the right one for a token that is certain, and the less right the less certain it is.
    """
    m, s = moments(GaussianChain(num_steps, 950), 1.0, std, -1.0)
    return (m - 1.0) ** 2 + (s - std) ** 2


@pytest.mark.parametrize(
    "num_steps, max_timestep, logit", [(6, 950, -1.0), (20, 999, 0.0), (2, 950, 1.0), (1, 950, 0.0)]
)
def test_samples_have_the_moments_of_the_recursion(num_steps, max_timestep, logit):
    chain, n = GaussianChain(num_steps, max_timestep), 20_000
    head = exact_head(chain, 1.0, 0.5, logit)
    x = chain.sample(head, ItemRNG(3, range(n)), (1,), dtype=torch.float64)[:, 0]
    m, s = moments(chain, 1.0, 0.5, logit)
    assert x.mean().item() == pytest.approx(m, abs=4 * s / math.sqrt(n))
    assert x.std().item() == pytest.approx(s, rel=4 / math.sqrt(2 * n))


def test_many_steps_draw_the_law_itself():
    assert moments(GaussianChain(), 1.0, 0.5, 0.0) == pytest.approx((1.0, 0.5), abs=2e-3)
    assert distance(1000, 0.5) < distance(100, 0.5) / 10 < distance(10, 0.5) / 100


def test_one_step_jumps_to_the_clean_sample():
    chain = GaussianChain(1, 950)
    x = chain.sample(exact_head(chain, 2.0, 0.0, 0.0), ItemRNG(0, range(4)), (3,), dtype=torch.float64)
    torch.testing.assert_close(x, torch.full((4, 3), 2.0, dtype=torch.float64), rtol=0, atol=1e-12)
    assert len(chain) == 1 and chain.log_posterior[0] == chain.log_beta[0]


def test_few_steps_from_nearly_pure_noise_stay_finite_in_float32():
    chain = GaussianChain(5)
    x = chain.sample(exact_head(chain, 1.0, 0.5, 0.0), ItemRNG(0, range(100)), (2,), dtype=torch.float32)
    assert x.isfinite().all() and x.dtype == torch.float32


def test_without_temperature_all_randomness_is_in_the_start():
    chain = GaussianChain(10, 950)
    head = exact_head(chain, 1.0, 0.5, 0.0)
    cold = chain.sample(head, ItemRNG(0, range(1000)), (1,), dtype=torch.float64, temperature=0.0)
    x = ItemRNG(0, range(1000)).normal((1,), dtype=torch.float64)
    for j in reversed(range(len(chain))):
        beta, abar = chain.beta[j], chain.abar[j]
        x = (x - beta / (1 - abar).sqrt() * head(x, chain.timesteps[j])[0]) / (1 - beta).sqrt()
    torch.testing.assert_close(cold, x)
    warm = chain.sample(head, ItemRNG(0, range(1000)), (1,), dtype=torch.float64)
    assert cold.std() < 0.9 * warm.std()


@pytest.mark.parametrize("kind", ["linear", "cosine", "two_stage"])
@pytest.mark.parametrize("budget", [200, 400])
def test_annealing_beats_constant_steps_at_equal_calls_where_late_tokens_are_certain(kind, budget):
    """Exact heads ``N(1, sigma_k^2)`` over 16 autoregressive steps; where no token is more certain, it does not."""
    annealed, constant = StepAnnealer(kind=kind, budget=budget), StepAnnealer(kind="constant", budget=budget)
    assert annealed.total(16) <= budget and constant.total(16) > budget - 16

    def error(annealer, fall):
        return sum(distance(annealer(k, 16), 0.5 * fall**k) for k in range(16))

    assert error(annealed, 0.7) < 0.7 * error(constant, 0.7)
    assert error(annealed, 1.0) > error(constant, 1.0)


def test_certain_tokens_need_fewer_steps():
    for num_steps in (5, 20, 50):
        errors = [distance(num_steps, 0.5 * 0.7**k) for k in range(16)]
        assert errors == sorted(errors, reverse=True) and errors[0] > 100 * errors[-1]
    assert distance(10, 0.5) > 10 * distance(50, 0.5)
    assert distance(10, 0.5 * 0.7**15) < 1.01 * distance(50, 0.5 * 0.7**15)


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(num_steps=0), "num_steps=0: accepted are 1 to 1000"),
        (dict(num_steps=1001), "num_steps=1001: accepted are 1 to 1000"),
        (dict(num_steps=5, max_timestep=1000), "max_timestep=1000: accepted are 0 to 999"),
        (dict(num_steps=5, max_timestep=-1), "max_timestep=-1: accepted are 0 to 999"),
    ],
)
def test_numbers_out_of_range(settings, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        GaussianChain(**settings)
