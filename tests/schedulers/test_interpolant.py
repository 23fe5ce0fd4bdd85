"""InterpolantScheduler against closed-form laws and, where they coincide, Diffusers' solvers."""

import math

import diffusers
import pytest
import torch

from genkit.interpolants import Linear, Trigonometric, VariancePreserving
from genkit.rng import ItemRNG
from genkit.sampling import sample
from genkit.schedulers import ExactDenoiserScheduler, InterpolantScheduler
from genkit.schedulers.interpolant import DIFFUSION_FORMS, diffusion_over_sigma, drift_step
from genkit.testing.oracles import Gaussian, GaussianMixture
from tests.schedulers.affine import moments

F64 = torch.float64
VP = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = VP | {"rescale_betas_zero_snr": True}
COSINE = {"_class_name": "SCMScheduler"}
PATHS = pytest.mark.parametrize("path", [None, COSINE, VP], ids=["linear", "cosine", "vp"])
FORMS = pytest.mark.parametrize("form", DIFFUSION_FORMS)


def scalar(t):
    return torch.tensor(t, dtype=F64)


def gaussian(scheduler, std=0.6):
    return Gaussian(torch.tensor([1.5]), std, interpolant=scheduler.interpolant)


def marginal(scheduler, t, std=0.6):
    alpha, sigma = scheduler.interpolant.alpha(t), scheduler.interpolant.sigma(t)
    return 1.5 * alpha, (std**2 * alpha**2 + sigma**2).sqrt()


# -- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, last_step, form, std",
    [
        (None, "mean", "none", 0.594),
        (None, "mean", "sigma", 0.597),
        (None, "mean", "sbdm", 0.593),
        (None, "tweedie", "none", 0.597),
        (None, "tweedie", "sigma", 0.598),
        (None, "tweedie", "sbdm", 0.599),
        (COSINE, "mean", "none", 0.597),
        (COSINE, "mean", "sigma", 0.591),
        (COSINE, "mean", "sbdm", 0.592),
        (COSINE, "tweedie", "none", 0.598),
        (COSINE, "tweedie", "sigma", 0.597),
        (COSINE, "tweedie", "sbdm", 0.603),
    ],
)
def test_one_sided_gaussian(path, last_step, form, std):
    """N(1.5, 0.6^2), 249 steps and the last; the figures are Monte-Carlo, with a standard error of 0.002."""
    scheduler = InterpolantScheduler(path=path, last_step=last_step, diffusion_form=form)
    scheduler.set_timesteps(250)
    mean, got = moments(scheduler, gaussian(scheduler))[-1]
    assert got == pytest.approx(std, abs=3 * 0.002)
    assert mean == pytest.approx(1.5, abs=0.007)


def two_sided(w, steps, forwards):
    """Euler-Maruyama between N(-1, 0.5^2) and N(2, 0.8^2), linear with gamma^2 = 2 s (1 - s); exact moments."""
    s = torch.linspace(0, 1, steps + 1, dtype=F64)
    s = s if forwards else s.flip(0)
    x = torch.tensor([-1.0, -0.5] if forwards else [2.0, 2.8], dtype=F64)  # the mean, and one standard deviation above
    drawn = 0.0
    for now, then in zip(s[:-1], s[1:], strict=True):
        m, dm = -(1 - now) + 2 * now, 3.0
        c = (1 - now) ** 2 * 0.25 + now**2 * 0.64 + 2 * now * (1 - now)
        dc = -2 * (1 - now) * 0.25 + 2 * now * 0.64 + 2 - 4 * now
        # Data, where times end, is at s = 1: velocities change their sign with time, scores do not.
        velocity, score = -(dm + dc / c / 2 * (x - m)), -(x - m) / c
        dt = float(now - then)
        moved = drift_step(x, velocity, w * score, dt)
        drawn = ((moved[1] - moved[0]) / (x[1] - x[0])) ** 2 * drawn + 2 * w * abs(dt)
        x = moved
    return x[0].item(), ((x[1] - x[0]) ** 2 + drawn).sqrt().item()


@pytest.mark.parametrize("w, forwards, backwards", [
    (0.0, (1.994, 0.807), (-1.002, 0.504)),
    (0.5, (1.999, 0.802), (-1.003, 0.500)),
    (2.0, (1.999, 0.799), (-1.002, 0.504)),
])  # fmt: skip
def test_two_sided_gaussian(w, forwards, backwards):
    """400 steps, 40 000 samples: standard errors of 0.004 and 0.0028 forwards, 0.0025 and 0.0018 backwards."""
    for (mean, std), figures, errors in (
        (two_sided(w, 400, True), forwards, (0.004, 0.0028)),
        (two_sided(w, 400, False), backwards, (0.0025, 0.0018)),
    ):
        assert mean == pytest.approx(figures[0], abs=3 * errors[0])
        assert std == pytest.approx(figures[1], abs=3 * errors[1])


@pytest.mark.parametrize("w, std", [(0.0, 0.824), (0.5, 0.810), (2.0, 0.816)])
def test_two_sided_gaussian_in_few_steps(w, std):
    assert two_sided(w, 50, True)[1] == pytest.approx(std, abs=3 * 0.0028)


# -- the coefficient -----------------------------------------------------------------------------------------------


def test_forms():
    t, n = 0.3, 1.7
    for path in (Linear(), Trigonometric(), VariancePreserving()):
        alpha, sigma, da, ds = (float(f(scalar(t))) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
        wanted = {
            "none": 0.0,
            "sigma": n * sigma,
            "constant": n,
            "sbdm": n * (sigma * ds - da / alpha * sigma**2),
            "linear": n * t,
            "decreasing": 0.25 * (n * math.cos(math.pi * (1 - t)) + 1) ** 2,
            "increasing-decreasing": n * math.sin(math.pi * t) ** 2,
        }
        assert set(wanted) == set(DIFFUSION_FORMS)
        for form, w in wanted.items():
            assert diffusion_over_sigma(path, scalar(t), form, n) * sigma == pytest.approx(w, rel=1e-12)


def test_sbdm_is_half_the_noising_diffusion():
    path, t = VariancePreserving(), scalar(0.4)
    beta = 0.1 + 0.4 * 19.9
    assert diffusion_over_sigma(path, t, "sbdm", 1) * float(path.sigma(t)) == pytest.approx(beta / 2, rel=1e-12)
    assert diffusion_over_sigma(Linear(), t, "sbdm", 1) * 0.4 == pytest.approx(0.4 / 0.6, rel=1e-12)


def test_no_division_where_the_coefficient_vanishes_with_the_noise():
    t = scalar(1e-12)
    assert diffusion_over_sigma(Linear(), t, "sigma", 2) == 2
    assert diffusion_over_sigma(Linear(), t, "linear", 2) == pytest.approx(2, rel=1e-12)
    assert diffusion_over_sigma(Linear(), t, "sbdm", 2) == pytest.approx(2, rel=1e-9)
    assert diffusion_over_sigma(Linear(), scalar(1.0), "sbdm", 1) == math.inf


@PATHS
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_fields_are_the_laws_velocity_and_score(path, prediction_type):
    scheduler = InterpolantScheduler(path=path, diffusion_form="sbdm", diffusion_norm=0.7)
    scheduler.prediction_type = prediction_type
    law = GaussianMixture(torch.tensor([[-1.0], [2.0]]), 0.5, interpolant=scheduler.interpolant)
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    for t in (0.05, 0.5, 0.97):
        time = scalar(t).expand(9)
        velocity, pull = scheduler._fields(x, law.predict(prediction_type, x, time), scalar(t))
        path_ = scheduler.interpolant
        w = 0.7 * (path_.sigma(scalar(t)) * path_.d_sigma(scalar(t))
                   - path_.d_alpha(scalar(t)) / path_.alpha(scalar(t)) * path_.sigma(scalar(t)) ** 2)  # fmt: skip
        torch.testing.assert_close(velocity, law.velocity(x, time), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pull, w * law.score(x, time), rtol=1e-9, atol=1e-9)


# -- marginals -----------------------------------------------------------------------------------------------------


@PATHS
@FORMS
@pytest.mark.parametrize("integrator", ["euler", "exact"])
def test_marginals_are_kept_at_every_time(path, form, integrator):
    """Whatever the coefficient, to first order in the step, from the exact law at the first time."""
    errors = []
    for steps in (60, 120):
        scheduler = InterpolantScheduler(path=path, diffusion_form=form, integrator=integrator)
        scheduler.set_timesteps(timesteps=scheduler.interpolant.timestep(torch.linspace(0.9, 0.2, steps)).tolist())
        mean, std = marginal(scheduler, scheduler.times)
        got = moments(scheduler, gaussian(scheduler), start=(mean[0].item(), std[0].item()))[:-1]
        got = torch.tensor(got, dtype=F64)
        errors.append(max((got[:, 0] - mean[1:-1]).abs().max(), (got[:, 1] - std[1:-1]).abs().max()).item())
    assert errors[1] < 0.05
    assert 1.8 < errors[0] / errors[1] < 2.2


@PATHS
@FORMS
def test_heun_keeps_them_too(path, form):
    """To second order without noise, to first with it."""
    errors = []
    for steps in (30, 60):
        scheduler = InterpolantScheduler(path=path, diffusion_form=form, integrator="heun")
        scheduler.set_timesteps(timesteps=scheduler.interpolant.timestep(torch.linspace(0.9, 0.2, steps)).tolist())
        mean, std = marginal(scheduler, scheduler.times)
        got = moments(scheduler, gaussian(scheduler), start=(mean[0].item(), std[0].item()))[-2]  # at 0.2, no noise yet
        errors.append(max(abs(got[0] - mean[-2].item()), abs(got[1] - std[-2].item())))
    assert errors[1] < 0.015
    order = math.log2(errors[0] / errors[1])
    assert order > 1.9 if form == "none" else 0.9 < order < 1.1


@pytest.mark.parametrize("settings", [
    {"diffusion_form": "none"},
    {"diffusion_form": "sigma"},
    {"diffusion_form": "sbdm", "last_step": "tweedie"},
    {"diffusion_form": "constant", "diffusion_norm": 1.0, "integrator": "exact"},
    {"diffusion_form": "increasing-decreasing", "integrator": "heun"},
], ids=lambda s: s["diffusion_form"])  # fmt: skip
def test_a_mixture_is_sampled(settings):
    """A law whose score is not linear: mean, deviation and the share of the small component."""
    law = GaussianMixture(torch.tensor([[-1.5], [1.0]]), [0.4, 0.6], weights=[0.3, 0.7])
    scheduler = InterpolantScheduler(**settings)
    scheduler.set_timesteps(250)
    rng = ItemRNG(0, range(8000))
    x = sample(law.denoiser(), scheduler, rng.normal((1,), dtype=F64), generators=torch.Generator().manual_seed(0))
    variance = 0.3 * (0.16 + 2.25) + 0.7 * (0.36 + 1) - 0.25**2
    assert x.mean().item() == pytest.approx(0.25, abs=0.05)
    assert x.std().item() == pytest.approx(math.sqrt(variance), abs=0.04)
    exact = law.sample(200_000, generator=torch.Generator().manual_seed(1))
    assert (x < -0.5).double().mean().item() == pytest.approx((exact < -0.5).double().mean().item(), abs=0.02)


def test_a_large_coefficient_needs_the_exact_integrator():
    """Euler-Maruyama leaves its own noise behind once ``step w`` exceeds ``sigma^2``."""
    got = {}
    for integrator in ("euler", "exact"):
        scheduler = InterpolantScheduler(diffusion_form="constant", diffusion_norm=5.0, integrator=integrator)
        scheduler.set_timesteps(25)
        got[integrator] = moments(scheduler, gaussian(scheduler, 0.05))[-1][1]
    assert got["exact"] < 0.06
    assert got["euler"] > 10


def test_noising_undoes_denoising_without_noise():
    law = GaussianMixture(torch.tensor([[-1.5], [1.0]]), 0.5)
    x = torch.linspace(-2, 2, 21, dtype=F64)[:, None]
    errors = []
    for steps in (200, 400):
        times, y = torch.linspace(1, 0, steps + 1, dtype=F64), x
        for grid in (times, times.flip(0)):
            for now, then in zip(grid[:-1], grid[1:], strict=True):
                y = drift_step(y, law.velocity(y, now.expand(21)), 0.0, float(then - now))
        errors.append((y - x).abs().max().item())
    assert errors[1] < 0.05 and 1.8 < errors[0] / errors[1] < 2.2


# -- other solvers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, VP, ZERO_SNR | {"prediction_type": "v_prediction"}])
@pytest.mark.parametrize("form, c", [("none", 0.0), ("sbdm", 0.5), ("sbdm", 1.0)])
def test_the_exact_integrator_is_ddim_and_ddpm(path, form, c):
    runs = []
    for scheduler in (
        InterpolantScheduler(path=path, diffusion_form=form, diffusion_norm=c**2, integrator="exact"),
        ExactDenoiserScheduler(path=path, noise_scale=c),
    ):
        t = torch.linspace(1, 0.1, 6, dtype=F64)
        scheduler.set_timesteps(timesteps=scheduler.interpolant.timestep(t).tolist())
        law = gaussian(scheduler)
        x = torch.linspace(-2, 2, 8, dtype=F64)[:, None]
        runs.append(sample(law.denoiser("sample"), scheduler, x, generators=ItemRNG(0, range(8)).generators()))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls, integrator", [
    ("FlowMatchEulerDiscreteScheduler", "euler"),
    ("FlowMatchHeunDiscreteScheduler", "heun"),
])  # fmt: skip
def test_the_ode_is_that_of_diffusers(cls, integrator):
    reference = getattr(diffusers, cls)(shift=2.0)
    reference.set_timesteps(6)
    law = Gaussian(torch.tensor([1.0, -2.0]), 0.5)
    x = torch.randn(16, 2, dtype=F64)
    wanted = sample(law.denoiser(), reference, x)
    scheduler = InterpolantScheduler.from_scheduler(
        reference, diffusion_form="none", integrator=integrator, last_step="euler"
    )
    scheduler.set_timesteps(timesteps=reference.timesteps.unique().flip(0).tolist())
    assert scheduler.timesteps.tolist() == reference.timesteps.tolist()
    assert scheduler.order == reference.order
    torch.testing.assert_close(sample(law.denoiser(), scheduler, x), wanted, rtol=0, atol=2e-6)


# -- the last step -------------------------------------------------------------------------------------------------


def test_last_steps():
    t, x, v = 0.04, torch.tensor([[0.7]], dtype=F64), torch.tensor([[-0.9]], dtype=F64)
    eps = x + (1 - t) * v
    wanted = {
        "mean": x - t * (v + 2 * eps),
        "tweedie": x - t * v,
        "euler": x - t * v,
        "none": x - t * (v + 2 * eps) + math.sqrt(2 * 2 * t * t) * 0.5,
    }
    for last_step, value in wanted.items():
        for integrator in ("euler", "heun"):
            scheduler = InterpolantScheduler(last_step=last_step, diffusion_norm=2.0, integrator=integrator)
            scheduler.set_timesteps(timesteps=[40.0])
            scheduler._noise = lambda like, generator: torch.full_like(like, 0.5)
            got = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
            torch.testing.assert_close(got, value, rtol=0, atol=1e-6)  # the timestep is float32


def test_tweedie_and_euler_differ_on_curved_paths():
    ends = []
    for last_step in ("tweedie", "euler"):
        scheduler = InterpolantScheduler(path=COSINE, last_step=last_step)
        scheduler.set_timesteps(5)
        ends.append(moments(scheduler, gaussian(scheduler))[-1][0])
    assert abs(ends[0] - 1.5) < abs(ends[1] - 1.5)
