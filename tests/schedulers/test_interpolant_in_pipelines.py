"""InterpolantScheduler as pipelines and the sampling loop use it: times, generators, files, errors."""

import math

import diffusers
import pytest
import torch

from genkit.interpolants import DiscreteVP
from genkit.rng import ItemRNG
from genkit.sampling import sample, trajectory
from genkit.schedulers import InterpolantScheduler
from genkit.testing import tiny
from genkit.testing.oracles import Gaussian

F64 = torch.float64
VP = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = VP | {"rescale_betas_zero_snr": True}


# -- times ---------------------------------------------------------------------------------------------------------


def test_the_grid_ends_where_the_last_step_begins():
    for shift in (1.0, 3.0):
        scheduler = InterpolantScheduler(shift=shift, last_step_size=0.1)
        for n in (1, 2, 3, 10):
            scheduler.set_timesteps(n)
            assert len(scheduler.timesteps) == n and scheduler.times[0] == 1 and scheduler.times[-1] == 0
            assert n == 1 or scheduler.times[-2].item() == pytest.approx(0.1, abs=1e-12)
    scheduler = InterpolantScheduler(last_step_size=0.1)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.2], mu=math.log(2.0))
    assert scheduler.times.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    scheduler.set_timesteps(timesteps=[900.0, 30.0])
    assert scheduler.timesteps.tolist() == [900.0, 30.0]


def test_the_spacing_of_diffusers_is_left_alone():
    ddim = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler = InterpolantScheduler.from_scheduler(ddim)
    for s in (ddim, scheduler):
        s.set_timesteps(7)
    assert scheduler.timesteps.tolist() == ddim.timesteps.tolist()


@pytest.mark.parametrize("settings, moves", [
    ({"diffusion_form": "sbdm"}, True),
    ({"diffusion_form": "sbdm", "integrator": "heun"}, True),
    ({"diffusion_form": "sbdm", "integrator": "exact"}, False),
    ({"diffusion_form": "sigma"}, False),
    ({"diffusion_form": "none", "path": ZERO_SNR}, True),
    ({"diffusion_form": "sbdm", "path": ZERO_SNR | {"prediction_type": "v_prediction"}}, True),
    ({"diffusion_form": "sbdm", "path": VP}, False),
])  # fmt: skip
def test_a_singular_start_is_moved(settings, moves):
    scheduler = InterpolantScheduler(**settings)
    scheduler.set_timesteps(20)
    assert scheduler.times[0].item() == (0.999 if moves else 1.0)
    law = Gaussian(torch.tensor([1.5]), 0.6, interpolant=scheduler.interpolant)
    x = torch.randn(256, 1, dtype=F64)
    got = sample(law.denoiser(scheduler.prediction_type), scheduler, x, generators=torch.Generator().manual_seed(0))
    assert got.isfinite().all() and abs(got.mean().item() - 1.5) < 0.2


def test_calls_of_heun_and_its_start_in_the_middle():
    scheduler = InterpolantScheduler(integrator="heun")
    scheduler.set_timesteps(4)
    assert scheduler.order == 2 and len(scheduler.timesteps) == 7 and len(scheduler.sigmas) == 8
    x = torch.ones(1, 2)
    first = scheduler.timesteps[1 * scheduler.order]
    scheduler.step(x, first, x)
    assert scheduler.step_index == 3  # the first half of the second step, found by its timestep
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="begin at an even index"):
        scheduler.step(x, scheduler.timesteps[3], x)


# -- as a scheduler ------------------------------------------------------------------------------------------------


INTEGRATORS = pytest.mark.parametrize("integrator", ["euler", "heun", "exact"])


@INTEGRATORS
def test_a_sample_does_not_depend_on_its_neighbours(integrator):
    law = Gaussian(torch.zeros(3), 0.5)

    def run(items):
        scheduler = InterpolantScheduler(integrator=integrator)
        scheduler.set_timesteps(4)
        rng = ItemRNG(0, items)
        return sample(law.denoiser(), scheduler, rng.normal((3,), dtype=F64), generators=rng.generators())

    whole = run([0, 1, 2])
    torch.testing.assert_close(whole[1:2], run([1]), rtol=0, atol=1e-12)
    assert (whole[0] - whole[1]).abs().max() > 0.01


@INTEGRATORS
def test_runs_repeat_and_hold_their_generator(integrator):
    law = Gaussian(torch.zeros(3), 0.5)
    scheduler, x = InterpolantScheduler(integrator=integrator), torch.ones(2, 3)

    def run(generators=None):
        scheduler.set_timesteps(3)
        return sample(law.denoiser(), scheduler, x, generators=generators)

    def seeded():
        return [torch.Generator().manual_seed(s) for s in (4, 5)]

    wanted = run(seeded())
    next(trajectory(law.denoiser(), scheduler_with_steps(scheduler, 5), x, generators=seeded()))  # left half way
    assert torch.equal(run(seeded()), wanted)
    scheduler.set_generator(seeded())
    assert torch.equal(run(), wanted)
    assert not torch.equal(run(), wanted)


def scheduler_with_steps(scheduler, n):
    scheduler.set_timesteps(n)
    return scheduler


@INTEGRATORS
def test_the_ode_draws_nothing(integrator):
    scheduler = scheduler_with_steps(InterpolantScheduler(diffusion_form="none", integrator=integrator), 4)
    state = torch.get_rng_state()
    sample(Gaussian(torch.zeros(3), 0.5).denoiser(), scheduler, torch.ones(1, 3))
    assert torch.equal(torch.get_rng_state(), state)


@INTEGRATORS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(integrator, dtype):
    scheduler = scheduler_with_steps(InterpolantScheduler(integrator=integrator), 2)
    x = torch.ones(1, 2, dtype=dtype)
    for timestep in scheduler.timesteps:
        x = scheduler.step(x, timestep, x).prev_sample
        assert x.dtype == dtype


def test_half_a_step_of_heun_cannot_be_reindexed():
    law, x = Gaussian(torch.zeros(3), 0.5), torch.ones(2, 3)
    states = trajectory(law.denoiser(), scheduler_with_steps(InterpolantScheduler(integrator="heun"), 3), x)
    state = next(states)
    with pytest.raises(ValueError, match=r"InterpolantScheduler remembers earlier steps \(prev_derivative, sample\)"):
        state.gather(torch.tensor([1, 0]))
    next(states).gather(torch.tensor([1, 0]))  # between steps it remembers nothing
    next(trajectory(law.denoiser(), scheduler_with_steps(InterpolantScheduler(), 3), x)).gather(torch.tensor([1, 0]))


def test_saved_and_loaded(tmp_path):
    settings = dict(shift=2.0, diffusion_form="linear", diffusion_norm=0.5, integrator="heun", last_step="none")
    scheduler = InterpolantScheduler(**settings, last_step_size=0.02, path=VP, timestep_spacing="leading")
    scheduler.save_pretrained(tmp_path)
    again = InterpolantScheduler.from_pretrained(tmp_path)
    assert {k: again.config[k] for k in settings} == settings
    assert again.config.last_step_size == 0.02 and isinstance(again.interpolant, DiscreteVP) and again.order == 2


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
@INTEGRATORS
def test_in_pipelines_saved_and_reloaded(name, integrator, tiny_pipeline, tmp_path):
    pipe = tiny_pipeline(name)
    calls = []
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    network.register_forward_hook(lambda *_: calls.append(1))
    pipe.scheduler = InterpolantScheduler.from_scheduler(pipe.scheduler, integrator=integrator)

    def images(pipe, seed=1):
        pipe.scheduler.set_generator(torch.Generator().manual_seed(seed))
        arguments = tiny.call_arguments(name, 3)
        if name in ("sd15", "sdxl"):  # these pass theirs on
            arguments["generator"] = torch.Generator().manual_seed(seed)
        return torch.as_tensor(pipe(**arguments).images)

    first = images(pipe)
    assert len(calls) == (5 if integrator == "heun" else 3) and first.isfinite().all() and first.std() > 0.01
    assert (images(pipe, seed=2) - first).abs().max() > 1e-3
    if integrator == "euler" or name == "sd3":
        pipe.save_pretrained(tmp_path)
        pipe = type(pipe).from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        assert isinstance(pipe.scheduler, InterpolantScheduler) and pipe.scheduler.config.integrator == integrator
        torch.testing.assert_close(images(pipe), first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, cls", [
    ("sd15", "StableDiffusionImg2ImgPipeline"),
    ("sd3", "StableDiffusion3Img2ImgPipeline"),
])  # fmt: skip
@INTEGRATORS
def test_image_to_image(name, cls, integrator, tiny_pipeline):
    pipe = getattr(diffusers, cls)(**tiny_pipeline(name).components)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = InterpolantScheduler.from_scheduler(pipe.scheduler, integrator=integrator)
    calls = []
    network = pipe.unet if name == "sd15" else pipe.transformer
    network.register_forward_hook(lambda *_: calls.append(1))
    more = {} if name == "sd15" else {"max_sequence_length": 16, "height": 32, "width": 32}
    picture = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    image = pipe(
        "a cat", image=picture, strength=0.5, num_inference_steps=4, generator=generator, output_type="pt", **more
    ).images
    assert image.isfinite().all() and len(calls) == (3 if integrator == "heun" else 2)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"diffusion_form": "SBDM "}, "diffusion_form='SBDM ' is not known"),
        ({"diffusion_form": "inccreasing-decreasing"}, "did you mean 'increasing-decreasing'"),
        ({"integrator": "dopri5"}, "integrator='dopri5' is not known"),
        ({"last_step": "Mean"}, "last_step='Mean' is not known; did you mean 'mean'"),
        ({"diffusion_norm": -0.1}, "diffusion_norm=-0.1: must be finite and at least 0"),
        ({"diffusion_norm": math.nan}, "diffusion_norm=nan"),
        ({"last_step_size": 0.0}, r"last_step_size=0.0: must be in \(0, 1\)"),
        ({"path": {"_class_name": "EDMEulerScheduler"}}, "scales the network's input and output"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        InterpolantScheduler(**settings)


def test_bad_times():
    with pytest.raises(ValueError, match="starts at 0.999 there; the second time must be below that"):
        InterpolantScheduler(diffusion_form="sbdm").set_timesteps(timesteps=[1000.0, 999.5])
    with pytest.raises(ValueError, match="strictly decreasing"):
        InterpolantScheduler().set_timesteps(sigmas=[0.5, 0.7])


def test_a_denoiser_of_another_path_is_refused():
    scheduler = scheduler_with_steps(InterpolantScheduler(path=VP), 2)
    denoiser = Gaussian(torch.zeros(3), 0.5).denoiser()
    with pytest.raises(ValueError, match="walks the path DiscreteVP, but the denoiser was made for Linear"):
        sample(denoiser, scheduler, torch.zeros(1, 3))
    assert denoiser.calls == 0
