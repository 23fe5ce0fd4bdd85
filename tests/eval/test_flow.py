"""Straightness, transport cost and first-orderness against closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.on_path import OnPath
from genkit.eval.flow import first_orderness, straightness, transport_cost
from genkit.interpolants import Linear, expand, from_scheduler
from genkit.rng import ItemRNG
from genkit.sampling import sample, set_timesteps
from genkit.testing.oracles import Gaussian, eight_gaussians, probability_flow

F64 = torch.float64
MEAN, STD = torch.tensor([1.0, -2.0], dtype=F64), 0.5
LAW = Gaussian(MEAN, STD)
SD = DDIMScheduler(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    clip_sample=False,
    timestep_spacing="trailing",
)
# Second moments of exactly 1, so that what is a mean over noise needs no sampling.
CORNERS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=F64)


def test_straightness_of_a_gaussian_flow():
    """0.42920 by quadrature: d times the integral of (V' / (2 sqrt V) - (1 - c))^2."""
    t = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    variance = (1 - t) ** 2 * STD**2 + t**2
    exact = 2 * (((t - (1 - t) * STD**2) / variance.sqrt() - (1 - STD)) ** 2).mean().item()
    assert exact == pytest.approx(0.42920, abs=5e-6)
    found = straightness(LAW.denoiser(), CORNERS, num_steps=32)
    assert found.total == pytest.approx(exact, rel=2e-3)
    assert straightness(LAW.denoiser(), CORNERS, num_steps=1000).total == pytest.approx(exact, abs=1e-5)
    assert found.curvature.shape == (32,) and found.curvature.mean().item() == pytest.approx(found.total)
    # E|eps - x0|^2 = |m|^2 + d (1 - c)^2 for the flow x0 = m + c eps.
    assert found.transport_cost == pytest.approx(5 + 2 * 0.25, rel=2e-3)
    assert found.relative == pytest.approx(found.total / found.transport_cost)
    assert (found.x0 - (MEAN + STD * CORNERS)).abs().max() < 2e-3


def test_straightness_of_the_eight_gaussians():
    """1.336; 32 steps of Euler's rule would give 1.39."""
    eps = ItemRNG(0, range(20_000)).normal((2,), dtype=F64)
    assert straightness(eight_gaussians().denoiser(), eps, num_steps=32).total == pytest.approx(1.336, rel=0.02)


def test_a_flow_of_exact_pairs_is_straight():
    """x0 = m + c eps: the velocity -m + (1 - c) eps is constant along the path, and one Euler step is exact."""

    def velocity(x, t):
        t = expand(t, x)
        return (1 - STD) * (x - (1 - t) * MEAN) / (t + (1 - t) * STD) - MEAN

    denoiser = FunctionDenoiser(velocity, Linear(), "flow_prediction")
    found = straightness(denoiser, CORNERS, num_steps=8)
    assert found.total < 1e-28 and found.relative < 1e-28
    scheduler = FlowMatchEulerDiscreteScheduler()
    set_timesteps(scheduler, 1)
    assert (sample(denoiser, scheduler, CORNERS) - (MEAN + STD * CORNERS)).abs().max() < 1e-6
    assert (CORNERS - velocity(CORNERS, torch.ones(4, dtype=F64)) - (MEAN + STD * CORNERS)).abs().max() < 1e-15


@pytest.mark.parametrize("steps, std", [(1, 0.0), (2, 0.2), (4, 0.341), (8, 0.415)])
def test_few_euler_steps_of_a_flow_that_is_not_straight(steps, std):
    """The mean is exact for any number, the spread is not: one step collapses to the mean of the data."""
    x = CORNERS
    for k in range(steps):
        x = x - LAW.velocity(x, torch.tensor(1 - k / steps, dtype=F64)) / steps
    assert (x.mean(0) - MEAN).abs().max() < 1e-12
    assert x.std(0, correction=0).max().item() == pytest.approx(std, abs=6e-4)


def test_the_flow_costs_no_more_than_independent_ends_and_keeps_the_law():
    law = eight_gaussians()
    eps = ItemRNG(1, range(4000)).normal((2,), dtype=F64)
    x0 = probability_flow(law.velocity, eps, 1.0, 0.0, steps=60)
    apart = transport_cost(law.sample(4000, generator=torch.Generator().manual_seed(0)), eps)
    assert apart == pytest.approx(2 + 4 + 2 * 0.09, rel=0.05)
    assert transport_cost(x0, eps) < 0.6 * apart
    # Rectified once more by its own pairs, nothing moves: every convex cost stays as it is.
    assert x0.square().sum(1).mean().item() == pytest.approx(4 + 2 * 0.09, rel=0.03)


def test_another_path_is_put_on_the_linear_one():
    path = from_scheduler(SD)
    other = Gaussian(MEAN, STD, interpolant=path).denoiser("epsilon")
    with pytest.raises(ValueError, match="DiscreteVP; straightness is that of the linear path: wrap it in .*OnPath"):
        straightness(other, CORNERS)
    # Up to the noise that the discrete schedule does not reach, the same flow.
    assert straightness(OnPath(other), CORNERS, num_steps=64).total == pytest.approx(0.4290, rel=0.1)
    with pytest.raises(ValueError, match="num_steps=0: must be at least 1"):
        straightness(LAW.denoiser(), CORNERS, num_steps=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_first_orderness(kind):
    """0 for the predictor of matched pairs, on a curved path too; above 0 for the exact denoiser."""
    path = from_scheduler(SD)

    def matched(x, t):
        alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
        eps = (x - alpha * MEAN) / (alpha * STD + sigma)
        return path.target(kind, MEAN + STD * eps, eps, t)

    scheduler = DDIMScheduler.from_config(SD.config, prediction_type=kind)
    scheduler.set_timesteps(10)
    rectified = FunctionDenoiser(matched, path, kind)
    law = Gaussian(MEAN, STD, interpolant=path)
    assert first_orderness(rectified, scheduler, CORNERS) < 1e-10
    assert first_orderness(law.denoiser(kind), scheduler, CORNERS) > 0.01
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match="one step"):
        first_orderness(rectified, scheduler, CORNERS)
