"""Paths, their derivatives and the conversions between predictions."""

import diffusers
import pytest
import torch

from genkit.interpolants import (
    PREDICTION_TYPES,
    DiscreteVP,
    Linear,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
    from_scheduler,
    scheduler_prediction_type,
)

F64 = torch.float64
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
PATHS = {
    "linear": Linear(),
    "trigonometric": Trigonometric(),
    "vp": VariancePreserving(),
    "discrete": DiscreteVP(diffusers.DDIMScheduler(**SD).alphas_cumprod),
    "zero_snr": DiscreteVP(diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod),
    "ve": VarianceExploding(80.0),
}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def ends(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 2, dtype=F64, generator=g), torch.randn(n, 3, 2, dtype=F64, generator=g)


def test_paths_are_the_same_by_what_they_are():
    for name, one in PATHS.items():
        assert [other for other, path in PATHS.items() if one.same_as(path)] == [name]
    assert Linear(500).same_as(Linear())  # the name of a timestep is not the path
    assert DiscreteVP(diffusers.DDPMScheduler(**SD).alphas_cumprod).same_as(PATHS["discrete"])


def test_derivatives_match_central_differences(path):
    t = torch.linspace(0.0103, 0.9887, 23, dtype=F64)  # between the nodes of the discrete paths
    h = 1e-6
    for f, d in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        numeric = (f(t + h) - f(t - h)) / (2 * h)
        torch.testing.assert_close(d(t), numeric, rtol=1e-6, atol=1e-7)


def test_conversions_agree_in_all_directions(path):
    t = torch.linspace(0.02, 0.98, 9, dtype=F64)
    x0, eps = ends(9)
    x = path.interpolate(x0, eps, t)
    scale = max(1.0, float(path.sigma(t).max()))
    for a in PREDICTION_TYPES:
        for b in PREDICTION_TYPES:
            got = path.convert(path.target(a, x0, eps, t), a, b, x, t)
            torch.testing.assert_close(got, path.target(b, x0, eps, t), rtol=1e-11, atol=1e-12 * scale**2)


def test_update_moves_the_clean_sample_by_that_much(path):
    t = torch.linspace(0.05, 0.95, 9, dtype=F64)
    x0, eps = ends(9)
    update = torch.randn(9, 3, 2, dtype=F64)
    x = path.interpolate(x0, eps, t)
    for kind in PREDICTION_TYPES:
        moved = path.target(kind, x0, eps, t) + path.to_update(update, kind, t)
        torch.testing.assert_close(path.convert(moved, kind, "sample", x, t), x0 + update, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "trigonometric", "zero_snr"])
def test_exact_at_the_ends_or_an_error_that_says_why(name):
    path, (x0, eps) = PATHS[name], ends(2)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    assert path.alpha(t).tolist() == [1.0, 0.0] and path.sigma(t).tolist() == [0.0, 1.0]
    x = path.interpolate(x0, eps, t)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[1], eps[1])
    for kind in ("v_prediction", "flow_prediction"):
        got = path.convert(path.target(kind, x0, eps, t), kind, "sample", x, t)
        torch.testing.assert_close(got, x0, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match=r"'epsilon' into 'sample' at t=1: alpha\(t\) = 0"):
        path.convert(eps, "epsilon", "sample", x, t)
    with pytest.raises(ValueError, match=r"'sample' into 'epsilon' at t=0: sigma\(t\) = 0"):
        path.convert(x0, "sample", "epsilon", x, t)
    # Where the coefficient does not vanish the same conversion is exact.
    assert torch.equal(path.convert(eps[:1], "epsilon", "sample", x[:1], t[:1]), x0[:1])


def test_discrete_path_is_the_schedulers_at_every_trained_timestep():
    scheduler = diffusers.DDIMScheduler(**SD)
    path = from_scheduler(scheduler)
    k = torch.arange(1000)
    torch.testing.assert_close(path.alpha(path.time(k)) ** 2, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-15)
    assert torch.equal(path.timestep(path.time(k)), k.float())


@pytest.mark.parametrize("cls", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_fractional_timesteps_survive_and_name_the_noise_level_of_diffusers(cls):
    scheduler = getattr(diffusers, cls)(**SD, use_karras_sigmas=True)
    scheduler.set_timesteps(13)
    path = from_scheduler(scheduler)
    t = path.time(scheduler.timesteps)
    assert torch.equal(path.timestep(t), scheduler.timesteps.float())
    if cls == "EulerDiscreteScheduler":
        ratio = path.sigma(t) / path.alpha(t)
        torch.testing.assert_close(ratio, scheduler.sigmas[:-1].double(), rtol=2e-4, atol=0)


def test_flow_timesteps_survive():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(77)
    path = from_scheduler(scheduler)
    assert torch.equal(path.timestep(path.time(scheduler.timesteps)), scheduler.timesteps)
    torch.testing.assert_close(path.sigma(path.time(scheduler.timesteps)).float(), scheduler.sigmas[:-1])


FAMILIES = {
    Linear: ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"],
    DiscreteVP: [
        "DDPMScheduler",
        "DDIMScheduler",
        "DDIMInverseScheduler",
        "DDPMParallelScheduler",
        "PNDMScheduler",
        "DPMSolverSinglestepScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "SASolverScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ],
    VarianceExploding: ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"],
    Trigonometric: ["SCMScheduler"],
}


@pytest.mark.parametrize("cls,name", [(c, n) for c, names in FAMILIES.items() for n in names])
def test_schedulers_by_family(cls, name):
    assert type(from_scheduler(getattr(diffusers, name)())) is cls


def test_solvers_with_flow_sigmas_are_linear():
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert type(from_scheduler(scheduler)) is Linear
    assert scheduler_prediction_type(scheduler) == "flow_prediction"
    assert scheduler_prediction_type(diffusers.DDIMScheduler(prediction_type="v_prediction")) == "v_prediction"


def test_a_scheduler_without_continuous_state_is_refused():
    with pytest.raises(ValueError, match="VQDiffusionScheduler has no interpolant"):
        from_scheduler(diffusers.VQDiffusionScheduler(num_vec_classes=8))


def test_bad_input():
    with pytest.raises(ValueError, match="prediction_type='eps' is not known"):
        Linear().convert(torch.zeros(1, 1), "eps", "sample", torch.zeros(1, 1), torch.ones(1))
    with pytest.raises(ValueError, match="strictly decreasing"):
        DiscreteVP(torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        DiscreteVP(torch.tensor([1.0, 0.6]))


def test_low_precision_samples_are_converted_in_float32():
    x0, eps = (v.bfloat16() for v in ends(4))
    t = torch.full((4,), 0.3, dtype=F64)
    x = Linear().interpolate(x0, eps, t)
    assert x.dtype == torch.float32
    assert Linear().convert(eps, "epsilon", "sample", x, t).dtype == torch.float32
