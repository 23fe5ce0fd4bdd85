"""ExactDenoiserScheduler against its formulas, against Diffusers, and on laws whose marginals are known."""

import math

import diffusers
import pytest
import torch

from genkit.interpolants import DiscreteVP, Linear, Trigonometric, VarianceExploding, from_scheduler
from genkit.sampling import sample
from genkit.schedulers import ExactDenoiserScheduler
from genkit.schedulers.exact_denoiser import exact_coefficients
from genkit.testing import tiny
from genkit.testing.oracles import Gaussian
from tests.schedulers.affine import moments

F64 = torch.float64
VP = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = VP | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
COSINE = {"_class_name": "SCMScheduler"}


def scalar(t):
    return torch.tensor(t, dtype=F64)


# -- the step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [Linear(), Trigonometric(), VarianceExploding(20.0)])
@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("b", [0.5, 1.0, 3.0])
def test_the_step_is_that_of_ve_coordinates(path, c, b):
    t, s = scalar(0.7), scalar(0.55)
    kappa, kappa_next = (float(path.sigma(u) / path.alpha(u)) for u in (t, s))
    alpha, alpha_next = float(path.alpha(t)), float(path.alpha(s))
    d, x, z = 0.3, -1.1, 0.8
    two_m = (1 + c**2) * b
    if two_m == 1:
        variance = kappa_next**2 * math.log(kappa**2 / kappa_next**2)
    else:
        variance = (kappa_next**2 - kappa_next ** (2 * two_m) * kappa ** (2 - 2 * two_m)) / (two_m - 1)
    y = d + (x / alpha - d) * (kappa_next / kappa) ** two_m + c * math.sqrt(variance) * z
    on_clean, on_x, on_noise = exact_coefficients(path, t, s, c, b)
    assert on_clean * d + on_x * x + on_noise * z == pytest.approx(alpha_next * y, abs=1e-12)


@pytest.mark.parametrize("c, b", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (0.5, 3.0), (2.0, 0.5)])
def test_pure_noise_is_the_limit(c, b):
    s = scalar(0.8)
    at = exact_coefficients(Linear(), scalar(1.0), s, c, b)
    near = exact_coefficients(Linear(), scalar(1 - 1e-12), s, c, b)
    assert at == pytest.approx(near, abs=1e-5)
    if c:  # the sample is forgotten, and the noise is the path's own but for the narrowing
        assert at == pytest.approx((0.2, 0.0, 0.8 * c / math.sqrt((1 + c**2) * b - 1)), abs=1e-12)
    else:
        assert at == pytest.approx((0.2, 0.8, 0.0), abs=1e-12)


@pytest.mark.parametrize("c", [0.5, 1.0])
def test_the_logarithm_is_the_limit_of_the_power(c):
    b = 1 / (1 + c**2)
    t, s = scalar(0.7), scalar(0.55)
    at = exact_coefficients(Linear(), t, s, c, b)
    for near in (b * (1 - 1e-9), b * (1 + 1e-9)):
        assert at == pytest.approx(exact_coefficients(Linear(), t, s, c, near), abs=1e-8)


def test_the_last_step_is_the_clean_sample():
    for c, b in ((0.0, 1.0), (1.0, 1.0), (2.0, 0.5)):
        assert exact_coefficients(Linear(), scalar(0.3), scalar(0.0), c, b) == (1.0, 0.0, 0.0)
        assert exact_coefficients(Linear(), scalar(1.0), scalar(0.0), c, b) == (1.0, 0.0, 0.0)


# -- Diffusers -----------------------------------------------------------------------------------------------------


def against(reference, ours, steps, **kwargs):
    """The largest difference over a run on an exact model, where both see our samples and equal draws."""
    law = Gaussian(torch.tensor([1.0, -2.0]), 0.5, interpolant=ours.interpolant)
    reference.set_timesteps(steps)
    reference.alphas_cumprod = reference.alphas_cumprod.double()  # they take differences of these
    ours.set_timesteps(timesteps=reference.timesteps.tolist())
    assert ours.timesteps.tolist() == reference.timesteps.tolist()
    x, worst = torch.randn(16, 2, dtype=F64), 0.0
    for i, timestep in enumerate(ours.timesteps):
        prediction = law.predict(ours.prediction_type, x, ours.times[i].expand(16))
        generators = [torch.Generator().manual_seed(i) for _ in range(2)]
        theirs = reference.step(prediction, reference.timesteps[i], x, generator=generators[0], **kwargs).prev_sample
        x = ours.step(prediction, timestep, x, generator=generators[1]).prev_sample
        worst = max(worst, (x - theirs).abs().max().item())
    return worst


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim(prediction_type, eta, steps):
    reference = diffusers.DDIMScheduler(clip_sample=False, prediction_type=prediction_type)
    ours = ExactDenoiserScheduler.from_scheduler(reference, noise_scale=eta)
    assert against(reference, ours, steps, eta=eta) < 1e-10


@pytest.mark.parametrize("steps", [10, 500])
def test_ddpm(steps):
    reference = diffusers.DDPMScheduler(clip_sample=False)
    ours = ExactDenoiserScheduler.from_scheduler(reference, noise_scale=1.0)
    assert against(reference, ours, steps) < 1e-10


def test_flow_euler():
    """On the linear path the velocity, too, is constant where the clean sample and the noise are."""
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = ExactDenoiserScheduler.from_scheduler(reference)
    sigmas = [1 - k / 8 for k in range(8)]
    law = Gaussian(torch.tensor([1.0, -2.0]), 0.5)
    x, got = torch.randn(16, 2, dtype=F64), []
    for scheduler in (reference, ours):
        scheduler.set_timesteps(sigmas=sigmas)
        got.append(sample(law.denoiser(), scheduler, x))
    torch.testing.assert_close(*got, rtol=0, atol=1e-5)


# -- marginals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, VP, ZERO_SNR, COSINE], ids=["linear", "vp", "zero-snr", "cosine"])
@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, 2.0])
def test_a_constant_denoiser_is_solved_exactly(path, c):
    """Data at one point: five steps, any noise, and every marginal is the path's to rounding."""
    scheduler = ExactDenoiserScheduler(path=path, noise_scale=c)
    scheduler.set_timesteps(5)
    law = Gaussian(torch.tensor([1.5]), 1e-9, interpolant=scheduler.interpolant)
    alpha, sigma = (f(scheduler.times).tolist() for f in (scheduler.interpolant.alpha, scheduler.interpolant.sigma))
    got = moments(scheduler, law, start=(1.5 * alpha[0], sigma[0]))
    for (mean, std), a, s in zip(got, alpha[1:], sigma[1:], strict=True):
        assert mean == pytest.approx(1.5 * a, abs=1e-8)
        assert std == pytest.approx(s, abs=1e-8)


@pytest.mark.parametrize("path", [None, VP], ids=["linear", "vp"])
@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, 2.0])
def test_marginals_are_kept_at_any_noise(path, c):
    """At every time, with an error of first order in the step, on Karras's grid of noise levels."""
    worst = []
    for steps in (100, 200):
        scheduler = ExactDenoiserScheduler(path=path, noise_scale=c)
        kappa = torch.linspace(14 ** (1 / 7), 0.03 ** (1 / 7), steps, dtype=F64) ** 7
        scheduler.set_timesteps(sigmas=(kappa / (1 + kappa) if path is None else kappa).tolist())
        law = Gaussian(torch.tensor([1.5]), 0.6, interpolant=scheduler.interpolant)
        alpha, sigma = scheduler.interpolant.alpha(scheduler.times), scheduler.interpolant.sigma(scheduler.times)
        mean, std = 1.5 * alpha, (0.36 * alpha**2 + sigma**2).sqrt()
        got = torch.tensor(moments(scheduler, law, start=(mean[0].item(), std[0].item())), dtype=F64)
        worst.append(max((got[:, 0] - mean[1:]).abs().max(), (got[:, 1] - std[1:]).abs().max()).item())
    assert worst[1] < 0.01 * (1 + c**2)
    assert 1.8 < worst[0] / worst[1] < 2.2


@pytest.mark.parametrize(
    "exponents, means, variances, mean, variance",
    [
        ((3,), (0.0,), (2.25,), 0.0, 0.40),
        ((0.5,), (0.0,), (2.25,), 0.0, 16.0),
        ((-1, 2), (0.0, 1.0), (2.25, 1.0), 1.45, 0.53),
        ((-3, 4), (0.0, 1.0), (2.25, 1.0), 1.73, 0.245),
        ((1, 1), (1.0, -0.5), (1.0, 0.64), 0.145, 0.245),
    ],
    ids=["annealed 3", "annealed 0.5", "guided 2", "guided 4", "product"],
)
def test_sums_of_scores_without_weights(exponents, means, variances, mean, variance):
    """The column of unweighted sampling in the table of Gaussian targets: known, and not the density claimed."""
    path, b = VarianceExploding(20.0), float(sum(exponents))
    laws = [Gaussian(torch.tensor([m]), v**0.5, interpolant=path) for m, v in zip(means, variances, strict=True)]
    kappa = torch.linspace(20 ** (1 / 7), 1e-3 ** (1 / 7), 201, dtype=F64) ** 7
    times = torch.cat((kappa / 20.0, torch.zeros(1, dtype=F64)))
    x = torch.tensor([[0.0], [1.0]], dtype=F64)  # without randomness; with a unit of the initial sample's
    added = 0.0
    spread = 20 / math.sqrt(b)
    for t, s in zip(times[:-1], times[1:], strict=True):
        d = sum(e * law.denoise(x, t.expand(2)) for e, law in zip(exponents, laws, strict=True)) / b
        on_clean, on_x, on_noise = exact_coefficients(path, t, s, 1.0, b)
        moved = on_clean * d + on_x * x
        slope = (moved[1] - moved[0]).item() / (x[1] - x[0]).item()
        added = slope**2 * added + on_noise**2
        x = moved
    total = (spread * (x[1] - x[0]).item()) ** 2 + added
    assert x[0].item() == pytest.approx(mean, abs=0.01)
    assert total == pytest.approx(variance, rel=0.03)


def test_the_initial_sample_of_an_annealed_density_is_narrower():
    assert ExactDenoiserScheduler(exponent_sum=4.0, noise_scale=1.0).init_noise_sigma == 0.5


# -- as a scheduler ------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    scheduler = ExactDenoiserScheduler(noise_scale=0.5, exponent_sum=2.0, path=VP, timestep_spacing="leading")
    scheduler.save_pretrained(tmp_path)
    again = ExactDenoiserScheduler.from_pretrained(tmp_path)
    assert {k: again.config[k] for k in scheduler.config if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    assert again.init_noise_sigma == 0.5**0.5 and isinstance(again.interpolant, DiscreteVP)
    assert isinstance(from_scheduler(again), DiscreteVP)


def run(scheduler, seeds, x=None, **kwargs):
    scheduler.set_timesteps(3)
    x = torch.zeros(len(seeds), 3) if x is None else x
    law = Gaussian(torch.zeros(3), 0.5)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return sample(law.denoiser(), scheduler, x, generators=generators, **kwargs)


def test_a_sample_does_not_depend_on_its_neighbours():
    scheduler = ExactDenoiserScheduler(noise_scale=1.0)
    whole = run(scheduler, [1, 2, 3])
    torch.testing.assert_close(whole[1:2], run(scheduler, [2]), rtol=0, atol=1e-6)
    assert (whole[0] - whole[1]).abs().max() > 0.01


def test_a_generator_held_by_the_scheduler():
    scheduler = ExactDenoiserScheduler(noise_scale=1.0)
    scheduler.set_timesteps(3)
    x = torch.zeros(2, 3)

    def step(**kwargs):
        scheduler.set_timesteps(3)
        return scheduler.step(x, scheduler.timesteps[0], x, **kwargs).prev_sample

    seeded = lambda: [torch.Generator().manual_seed(s) for s in (4, 5)]  # noqa: E731
    wanted = step(generator=seeded())
    scheduler.set_generator(seeded())
    assert torch.equal(step(), wanted)
    assert not torch.equal(step(), wanted)  # it goes on
    assert torch.equal(step(generator=seeded()), wanted)  # what is given comes first
    scheduler.set_generator(None)
    torch.manual_seed(0)
    first = step()
    torch.manual_seed(0)
    assert torch.equal(step(), first)


def test_no_noise_draws_nothing():
    state = torch.get_rng_state()
    run(ExactDenoiserScheduler(), [0], torch.ones(1, 3))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    scheduler = ExactDenoiserScheduler(noise_scale=1.0)
    scheduler.set_timesteps(2)
    x = torch.ones(1, 2, dtype=dtype)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.dtype == dtype


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_in_pipelines_saved_and_reloaded(name, tiny_pipeline, tmp_path):
    """With noise; without it the ODE's Euler rule on the linear path is Diffusers'."""
    pipe = tiny_pipeline(name)
    original = pipe.scheduler
    plain = pipe(**tiny.call_arguments(name, 3)).images
    pipe.scheduler = ExactDenoiserScheduler.from_scheduler(original)
    ours = pipe(**tiny.call_arguments(name, 3)).images
    if name == "flux":
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=0, atol=1e-5)
    pipe.scheduler = ExactDenoiserScheduler.from_scheduler(original, noise_scale=1.0)
    pipe.scheduler.set_generator(torch.Generator().manual_seed(1))
    noisy = pipe(**tiny.call_arguments(name, 3)).images
    assert abs(noisy - ours).max() > 1e-3
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, ExactDenoiserScheduler)
    again.scheduler.set_generator(torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.tensor(again(**tiny.call_arguments(name, 3)).images), torch.tensor(noisy), rtol=0, atol=1e-5
    )


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"noise_scale": -1.0}, "noise_scale=-1.0: must be finite and at least 0"),
        ({"noise_scale": math.inf}, "noise_scale=inf"),
        ({"noise_scale": math.nan}, "noise_scale=nan"),
        ({"exponent_sum": 0.0}, "exponent_sum=0.0: must be above 0"),
        ({"path": {"_class_name": "EDMEulerScheduler"}}, "'EDMEulerScheduler' scales the network's input and output"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even' is not known"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ExactDenoiserScheduler(**settings)


@pytest.mark.parametrize("c, b", [(0.0, 0.5), (1.0, 0.5), (0.5, 0.75)])
def test_a_start_without_limit_is_refused_before_any_call(c, b):
    scheduler = ExactDenoiserScheduler(noise_scale=c, exponent_sum=b)
    with pytest.raises(ValueError, match="a step from pure noise"):
        scheduler.set_timesteps(4)
    scheduler.set_timesteps(sigmas=[0.999, 0.5])
    scheduler.set_timesteps(1)  # straight to the clean sample


def test_epsilon_models_cannot_start_without_signal():
    with pytest.raises(ValueError, match="an epsilon model says nothing of the clean sample"):
        ExactDenoiserScheduler(path=ZERO_SNR | {"prediction_type": "epsilon"}).set_timesteps(4)


def test_a_denoiser_of_another_path_is_refused():
    scheduler = ExactDenoiserScheduler(path=VP)
    scheduler.set_timesteps(2)
    denoiser = Gaussian(torch.zeros(3), 0.5).denoiser()
    with pytest.raises(ValueError, match="walks the path DiscreteVP, but the denoiser was made for Linear"):
        sample(denoiser, scheduler, torch.zeros(1, 3))
    assert denoiser.calls == 0
