"""One law of data on two paths: what is exact on the one is exact on the other."""

import pytest
import torch
from diffusers import DDIMScheduler

from genkit.denoisers import FunctionDenoiser, FunctionFlowMap, from_pipeline
from genkit.denoisers.on_path import OnPath, change_path
from genkit.interpolants import (
    PREDICTION_TYPES,
    DiscreteVP,
    Linear,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
    from_scheduler,
)
from genkit.rng import ItemRNG
from genkit.testing import tiny
from genkit.testing.oracles import Gaussian, eight_gaussians, probability_flow

F64 = torch.float64
STABLE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SD = from_scheduler(DDIMScheduler(**STABLE))
ZERO_SNR = from_scheduler(DDIMScheduler(**STABLE, rescale_betas_zero_snr=True))
PATHS = {
    "linear": Linear(),
    "trigonometric": Trigonometric(),
    "vp": VariancePreserving(),
    "sd": SD,
    "zero_snr": ZERO_SNR,
    "ve": VarianceExploding(),
}


@pytest.mark.parametrize("name", PATHS)
def test_time_at_is_the_inverse(name):
    path = PATHS[name]
    t = torch.cat((torch.tensor([0.0, 1e-4, 1e-3, 0.0005, 0.9995, 1.0]), torch.linspace(0, 1, 1001))).double()
    back = path.time_at(3 * path.alpha(t), 3 * path.sigma(t))
    assert (back - t).abs().max() < 1e-12
    one = path.time_at(path.alpha(t[7]), path.sigma(t[7]))
    assert one.shape == () and abs(one - back[7]) < 1e-12
    # Beyond the end, and at pure noise and pure data, it is the end.
    ends = path.time_at(torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64))
    assert torch.allclose(ends, torch.tensor([1.0, 0.0], dtype=F64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("name", PATHS)
def test_time_at_has_the_derivative_of_the_inverse(name):
    path = PATHS[name]
    t = torch.tensor([0.12345, 0.5004, 0.8777], dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(path.time_at(path.alpha(t), path.sigma(t)).sum(), t)
    assert (slope - 1).abs().max() < 1e-9


def test_the_linear_path_by_the_formula():
    x, t = ItemRNG(0, range(5)).normal((3,), dtype=F64), torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=F64)
    moved, there = change_path(x, t, SD, Linear())
    total = SD.alpha(t) + SD.sigma(t)
    assert torch.allclose(there, SD.sigma(t) / total, atol=1e-15, rtol=0)
    assert torch.allclose(moved, x / total[:, None], atol=1e-14, rtol=0)
    back, again = change_path(moved, there, Linear(), SD)
    assert torch.allclose(back, x, atol=1e-12, rtol=0) and torch.allclose(again, t, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", PATHS)
def test_exact_teachers_stay_exact(name, kind):
    """A teacher of any type on any path gives the linear path's exact velocity, and its every view."""
    law, goal = eight_gaussians(interpolant=PATHS[name]), eight_gaussians()
    moved = OnPath(law.denoiser(kind))
    noisiest = float(change_path(torch.ones(1, 2, dtype=F64), torch.ones(1, dtype=F64), PATHS[name], Linear())[1])
    t = torch.linspace(0.02, min(noisiest, 0.999), 64, dtype=F64)
    x = Linear().interpolate(law.sample(64, generator=torch.Generator().manual_seed(0)), torch.ones(2, dtype=F64), t)
    prediction = moved(x, t)
    assert prediction.prediction_type == "flow_prediction"
    assert (prediction.velocity - goal.velocity(x, t)).abs().max() < 1e-10
    assert (prediction.sample - goal.predict("sample", x, t)).abs().max() < 1e-10
    assert (prediction.epsilon - goal.epsilon(x, t)).abs().max() < 1e-10


def test_between_any_two_paths():
    law, goal = eight_gaussians(interpolant=SD), eight_gaussians(interpolant=Trigonometric())
    t = torch.linspace(0.05, 0.9, 33, dtype=F64)
    x = ItemRNG(1, range(33)).normal((2,), dtype=F64)
    assert (OnPath(law.denoiser("epsilon"), Trigonometric())(x, t).velocity - goal.velocity(x, t)).abs().max() < 1e-10


def test_trajectories_go_over_into_each_other():
    """The linear path's ODE, from a point of a variance-preserving trajectory, ends where that trajectory ends."""
    law = Gaussian([1.0, -2.0], 0.5, interpolant=SD)
    x, start = ItemRNG(2, range(4)).normal((2,), dtype=F64), torch.tensor(0.7, dtype=F64)
    moved, there = change_path(x, start, SD, Linear())
    flow = OnPath(law.denoiser("v_prediction"))
    end = probability_flow(lambda x, t: flow(x, t).velocity, moved, float(there), 0.0, steps=100)
    assert (end - law.flow_map(x, start, torch.tensor(0.0, dtype=F64))).abs().max() < 1e-6


def test_beyond_the_end_of_the_own_path():
    """Pure noise is what samplers start from, and the clean sample and noise that are predicted explain it."""
    seen = []

    def network(x, t):
        seen.append((x, t))
        return torch.full_like(x, 0.1)

    flow = OnPath(FunctionDenoiser(network, SD, "epsilon"))
    x = ItemRNG(3, range(3)).normal((2,), dtype=F64)
    prediction = flow(x, torch.ones(3, dtype=F64))
    ((z, t),) = seen
    assert torch.allclose(z, x, atol=1e-15) and (t == 1).all()
    clean = SD.convert(torch.full_like(x, 0.1), "epsilon", "sample", x, t)
    assert torch.allclose(prediction.sample, clean, atol=1e-12) and torch.allclose(prediction.epsilon, x, atol=1e-12)
    # It goes over continuously at the last noise of the own path.
    _, last = change_path(x, torch.ones(3, dtype=F64), SD, Linear())
    below, above = (flow(x, last + d).velocity for d in (-1e-7, 1e-7))
    assert (below - above).abs().max() < 1e-4


def test_a_pipeline_and_its_counts():
    pipe = tiny.pipeline("sd15")
    denoiser = from_pipeline(pipe)
    flow = OnPath(denoiser)
    condition = flow.encode(pipe, prompt=["a", "b"], negative_prompt="")
    x, t = ItemRNG(0, range(2)).normal((4, 16, 16)), torch.tensor([0.3, 0.8])
    cond, null = flow.many(x, t, [condition, condition.null()])
    assert denoiser.calls == flow.calls == 2 and flow.module is denoiser.module
    moved, there = change_path(x, t, Linear(), SD)
    own = denoiser(moved, there.float(), condition)
    assert torch.allclose(cond.sample, own.sample, atol=1e-4) and not torch.allclose(cond.raw, null.raw)
    _, (feature,) = flow.features(x, t, condition, ["mid_block"])
    assert feature.ndim == 4


def test_half_precision():
    law = eight_gaussians(interpolant=SD)
    x, t = ItemRNG(4, range(8)).normal((2,)), torch.linspace(0.1, 0.9, 8)
    exact = OnPath(law.denoiser("epsilon"))(x, t).velocity
    half = OnPath(law.denoiser("epsilon"))(x.bfloat16(), t).velocity
    assert half.dtype == torch.float32 and (half - exact).abs().max() < 0.5


def test_flow_maps_are_refused():
    with pytest.raises(TypeError, match="denoiser=FunctionFlowMap is a flow map"):
        OnPath(FunctionFlowMap(lambda x, t, s: x, Linear()))


def test_what_has_no_inverse_says_so():
    class Strange(Linear):
        time_at = DiscreteVP.__mro__[1].time_at

    with pytest.raises(NotImplementedError, match="Strange defines no time_at"):
        change_path(torch.ones(1, 2), torch.ones(1), Linear(), Strange())
