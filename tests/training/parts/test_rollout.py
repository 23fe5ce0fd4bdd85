"""The rollout that gradients pass: it makes the steps of samplers, whatever is differentiated."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from genkit.denoisers import FunctionDenoiser, from_pipeline
from genkit.denoisers.base import Condition
from genkit.guidance import CFG
from genkit.interpolants import from_scheduler
from genkit.rng import ItemRNG
from genkit.sampling import sample
from genkit.schedulers import ExactDenoiserScheduler
from genkit.testing import tiny
from genkit.training.objectives.draft import DRaFT
from genkit.training.parts.reference import Reference
from genkit.training.parts.rollout import Grid, Rollout, schedule, walker
from tests.training.reward_toys import F64, As, Net, gradient, objective, vp

N = 5
TIMES = {
    "ddim": lambda kind: vp(kind),
    "ddim_trailing": lambda k: DDIMScheduler(clip_sample=False, prediction_type=k, timestep_spacing="trailing"),
    "flow": lambda kind: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
KINDS = [("ddim", k) for k in ("epsilon", "sample", "v_prediction")]
KINDS += [("ddim_trailing", "epsilon"), ("flow", "flow_prediction")]


def rollout(kind="flow_prediction", scheduler=None, steps=N, condition=None, **settings):
    scheduler = scheduler or ExactDenoiserScheduler()
    walk = walker(scheduler)
    walk.set_timesteps(steps)
    torch.manual_seed(0)
    student = FunctionDenoiser(As(Net(), walk.interpolant, kind), walk.interpolant, kind)
    return Rollout(student, Grid(walk.times, walk.timesteps), condition or Condition(), **settings), walk


def noise(n=3):
    return ItemRNG(1, range(n)).normal((1, 2, 2), dtype=F64)


@pytest.mark.parametrize("name, kind", KINDS)
def test_it_is_the_sampling_loop(name, kind):
    run, walk = rollout(kind, TIMES[name](kind))
    with torch.no_grad():
        got = run.walk(noise(), 0, N)
    torch.testing.assert_close(got, sample(run.student, walk, noise()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, kind", KINDS)
def test_it_takes_the_steps_of_diffusers(name, kind):
    """DDIM with ``set_alpha_to_one`` in float64, or Euler on the linear path, whose state is float32 there."""
    theirs = TIMES[name](kind)
    run, _ = rollout(kind, theirs)
    if name == "flow":
        theirs = FlowMatchEulerDiscreteScheduler()
        theirs.set_timesteps(sigmas=run.grid.times[:-1].tolist())
    else:
        theirs.alphas_cumprod = theirs.alphas_cumprod.double()
        theirs.final_alpha_cumprod = torch.ones((), dtype=F64)
        theirs.set_timesteps(N)
        assert theirs.timesteps.tolist() == run.grid.timesteps.tolist()
    x = y = noise()
    with torch.no_grad():
        for i, timestep in enumerate(theirs.timesteps):
            prediction = run.predict(x, i)
            y = theirs.step(prediction.raw, timestep, x).prev_sample
            x = run.advance(prediction, i)
            tolerance = 1e-6 if name == "flow" else 1e-12
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_euler_of_sigmas_is_the_same_walk():
    """Diffusers' Euler walks ``x / alpha``; at the same times it ends at the same sample."""
    theirs = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", timestep_spacing="trailing")
    run, _ = rollout("epsilon", scheduler)
    theirs.set_timesteps(N)
    assert theirs.timesteps.tolist() == run.grid.timesteps.tolist()
    sigmas = run.student.interpolant.sigma(run.grid.times) / run.student.interpolant.alpha(run.grid.times)
    theirs.sigmas = sigmas
    x = noise()
    y = x / run.student.interpolant.alpha(run.grid.times[0])
    with torch.no_grad():
        for i, timestep in enumerate(theirs.timesteps):
            prediction = run.predict(x, i)
            x = run.advance(prediction, i)
            y = theirs.step(prediction.raw, timestep, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)  # its state is float32


@pytest.mark.parametrize("name, kind", KINDS)
def test_the_noise_of_the_ddpm_posterior(name, kind):
    """Under the same draws, what ExactDenoiserScheduler does with ``noise_scale=1``."""
    run, walk = rollout(kind, TIMES[name](kind), noise_scale=1.0, rng=ItemRNG(5, range(3)))
    theirs = ExactDenoiserScheduler.from_scheduler(walk, noise_scale=1.0)
    theirs.set_timesteps(N)
    draws = ItemRNG(5, range(3))
    theirs._noise = lambda like, generator: draws.normal(like.shape[1:], dtype=like.dtype)
    with torch.no_grad():
        got = run.walk(noise(), 0, N)
    torch.testing.assert_close(got, sample(run.student, theirs, noise()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("detach", [False, True])
def test_guidance_has_the_value_of_the_guider(scale, detach):
    number = torch.linspace(-1, 1, 3, dtype=F64)
    condition = Condition({"number": number}, {"number": 0 * number})
    run, walk = rollout(condition=condition, guidance_scale=scale, detach_unconditional=detach)
    wanted = sample(run.student, walk, noise(), condition, guider=CFG(guidance_scale=scale))
    torch.testing.assert_close(run.walk(noise(), 0, N), wanted, rtol=1e-12, atol=1e-12)


def test_rows_at_different_calls_are_as_if_alone():
    run, _ = rollout()
    x, start, end = noise(), torch.tensor([0, 2, 4]), torch.tensor([3, 3, 5])
    with torch.no_grad():
        got = run.step(run.predict(x, start), start, end)
        for row in range(3):
            i, j = int(start[row]), int(end[row])
            alone = run.step(run.predict(x[row : row + 1], i), i, j)
            torch.testing.assert_close(got[row : row + 1], alone, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name, kind", [("ddim", "epsilon"), ("ddim", "sample"), ("flow", "flow_prediction")])
def test_a_step_from_elsewhere_keeps_the_velocity(name, kind):
    """Whatever the network predicts: on the linear path ``x + (t_j - t_i) v``."""
    run, _ = rollout(kind, TIMES[name](kind))
    path, times = run.student.interpolant, run.grid.times
    with torch.no_grad():
        here = run.predict(noise(), 1)
        there = run.step(here, 1, 3, x=noise() + 1)
    v, x, t, s = here.velocity, noise() + 1, times[1], times[3]
    clean = path.convert(v, "flow_prediction", "sample", x, t)
    eps = path.convert(v, "flow_prediction", "epsilon", x, t)
    torch.testing.assert_close(there, path.alpha(s) * clean + path.sigma(s) * eps, rtol=1e-12, atol=1e-12)
    if name == "flow":
        torch.testing.assert_close(there, x + (s - t) * v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run.step(here, 1, 3, x=noise()), run.step(here, 1, 3), rtol=1e-12, atol=1e-12)


def test_state_stays_in_float32():
    run, _ = rollout()
    run.student.module.to(torch.bfloat16)
    net = run.student.network.net
    forward = net.forward
    net.forward = lambda x, t, **c: forward(x.bfloat16(), t, **c)
    net.bfloat16()
    x = run.walk(noise().float(), 0, N)
    assert x.dtype == torch.float32 and x.requires_grad


@pytest.mark.parametrize("recompute", [False, True])
def test_the_prior_is_the_distance_from_the_base(recompute):
    """Over the calls with gradient; 0 before anything has moved."""
    settings = dict(live_steps=2, prior_weight=10.0, recompute=recompute)
    made = objective(DRaFT, **settings)
    assert torch.equal(gradient(made), gradient(objective(DRaFT, live_steps=2, recompute=recompute)))
    with torch.no_grad():
        for w in made.student.module.parameters():
            w.add_(0.1)
    run = Rollout(made.student, made.grid((1, 2, 2)), Condition(), base=made.base, recompute=recompute)
    with torch.no_grad():
        x = run.walk(noise(), 0, 4)
    assert run.penalty is None
    run.walk(x, 4, 6)
    with torch.no_grad():
        wanted = torch.zeros(3, dtype=F64)
        for i in (4, 5):
            t = run.grid.times[i].expand(3)
            moved = made.student.module(x, t)
            with made.base.network() as base:
                wanted += (moved - base(x, t).raw).square().flatten(1).mean(1)
            x = run.advance(run.predict(x, i), i)
    torch.testing.assert_close(run.penalty, wanted, rtol=1e-12, atol=0)
    assert isinstance(made.base, Reference) and wanted.min() > 0


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_times_are_those_of_the_pipelines_scheduler(name):
    """Flux's are shifted by the size of the picture, as its pipeline does."""
    pipe = tiny.pipeline(name)
    walk = walker(pipe.scheduler)
    shape = (4, 8, 8) if name == "sd15" else (pipe.transformer.config.in_channels // 4, 8, 8)
    student = from_pipeline(pipe)
    schedule(student, pipe, walk, 3, shape)
    first = walk.times.clone()
    assert len(walk.timesteps) == 3 and from_scheduler(walk).same_as(student.interpolant)
    schedule(student, pipe, walk, 3, (shape[0], 16, 16))
    assert torch.equal(first, walk.times) == (name == "sd15" or not pipe.scheduler.config.use_dynamic_shifting)
