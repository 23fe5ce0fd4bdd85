"""FlowMapScheduler as Diffusers' pipelines use it."""

import diffusers
import pytest
import torch

from genkit.interpolants import DiscreteVP, Linear, from_scheduler, scheduler_prediction_type
from genkit.schedulers import FlowMapScheduler


def test_timesteps_are_a_thousandth_of_time_and_as_many_as_calls():
    scheduler = FlowMapScheduler()
    for n in (1, 2, 3):
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.tolist() == pytest.approx([1000 * (1 - k / n) for k in range(n)])
        assert scheduler.sigmas[-1] == 0 and len(scheduler.sigmas) == n + 1


def test_custom_times_as_flux_gives_them():
    scheduler = FlowMapScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.0)
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0]
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.0]
    scheduler.set_timesteps(timesteps=[900.0, 300.0])
    assert scheduler.timesteps.tolist() == [900.0, 300.0]


def test_step_and_target():
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(2)
    x, u = torch.ones(1, 2), torch.full((1, 2), 0.5)
    assert scheduler.jump_target(scheduler.timesteps[0]) == 0.5
    (y,) = scheduler.step(u, scheduler.timesteps[0], x, return_dict=False)
    assert y.tolist() == [[0.75, 0.75]] and scheduler.step_index == 1
    assert scheduler.step(u, scheduler.timesteps[1], y).prev_sample.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    scheduler = FlowMapScheduler(stochastic=True)
    scheduler.set_timesteps(2)
    x = torch.ones(1, 2, dtype=dtype)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.dtype == dtype


def test_stochastic_steps_follow_their_generators():
    scheduler = FlowMapScheduler(stochastic=True)
    scheduler.set_timesteps(2)
    assert scheduler.jump_target(scheduler.timesteps[0]) == 0

    def step(seeds):
        scheduler.set_timesteps(2)
        x = torch.zeros(len(seeds), 3)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return scheduler.step(x, scheduler.timesteps[0], x, generator=generators).prev_sample

    assert torch.equal(step([1, 2])[1:], step([2]))


def test_a_generator_held_by_the_scheduler():
    """For pipelines that give ``step`` none."""
    x, drawn = torch.zeros(2, 3), []
    for seed in (1, 1, 2):
        scheduler = FlowMapScheduler(stochastic=True)
        scheduler.set_timesteps(2)
        scheduler.set_generator(torch.Generator().manual_seed(seed))
        drawn.append(scheduler.step(x, scheduler.timesteps[0], x).prev_sample)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_config_round_trip_and_swap(tmp_path):
    scheduler = FlowMapScheduler.from_config(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5).config, stochastic=True
    )
    assert scheduler.config.shift == 2.5
    scheduler.save_pretrained(tmp_path)
    again = FlowMapScheduler.from_pretrained(tmp_path)
    assert again.config.stochastic is True and again.config.shift == 2.5


def test_a_student_of_a_variance_preserving_teacher(tmp_path):
    teacher = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    FlowMapScheduler.from_scheduler(teacher).save_pretrained(tmp_path)
    scheduler = FlowMapScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999.0]
    path = from_scheduler(scheduler)
    assert isinstance(path, DiscreteVP) and scheduler_prediction_type(scheduler) == "epsilon"
    t = path.time(torch.tensor([500]))
    assert path.alpha(t).item() ** 2 == pytest.approx(teacher.alphas_cumprod[500].item(), rel=1e-6)
    flow = FlowMapScheduler.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), shift=1.0)
    assert isinstance(from_scheduler(flow), Linear) and scheduler_prediction_type(flow) == "flow_prediction"
    flow.set_timesteps(2)
    assert flow.times.tolist() == [1.0, 0.5, 0.0]


def test_the_scheduler_of_a_pipeline_can_be_swapped_either_way():
    ddim = diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for swap in (FlowMapScheduler.from_scheduler, lambda s, **kw: FlowMapScheduler.from_config(s.config, **kw)):
        scheduler = swap(ddim, timestep_spacing="leading")
        assert isinstance(scheduler.interpolant, DiscreteVP) and scheduler.prediction_type == "v_prediction"
        scheduler.set_timesteps(4)
        ddim.set_timesteps(4)
        assert scheduler.timesteps.tolist() == ddim.timesteps.tolist()
        scheduler = swap(flow, stochastic=True)
        assert (
            isinstance(scheduler.interpolant, Linear) and scheduler.config.shift == 3.0 and scheduler.config.stochastic
        )
        assert swap(scheduler).config.stochastic
    assert swap(flow, shift=1.0).config.shift == 1.0


def test_loading_warns_of_nothing(tmp_path, caplog):
    """Another class's settings would be warned of at every loading."""
    from diffusers.utils import logging

    logging.enable_propagation()
    try:
        flows = [diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=d) for d in (False, True)]
        for other in (*flows, diffusers.DDIMScheduler()):
            other.save_pretrained(tmp_path)
            for swap in (FlowMapScheduler.from_scheduler, lambda s: FlowMapScheduler.from_config(s.config)):
                swap(type(other).from_pretrained(tmp_path)).save_pretrained(tmp_path / "ours")
                FlowMapScheduler.from_pretrained(tmp_path / "ours")
    finally:
        logging.disable_propagation()
    assert "expected" not in caplog.text


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_spacings_are_those_of_diffusers(spacing):
    ddim = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler = FlowMapScheduler.from_scheduler(ddim)
    assert scheduler.config.timestep_spacing == spacing
    for n in (3, 30):
        ddim.set_timesteps(n)
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.tolist() == ddim.timesteps.tolist()


def test_sigmas_of_a_variance_preserving_path_are_noise_levels():
    scheduler = FlowMapScheduler.from_scheduler(diffusers.DDIMScheduler())
    scheduler.set_timesteps(sigmas=[14.6, 1.0, 0.1, 0.0])
    path, t = scheduler.interpolant, scheduler.times[:-1]
    assert (path.sigma(t) / path.alpha(t)).tolist() == pytest.approx([14.6, 1.0, 0.1])
    with pytest.raises(ValueError, match="noise level ends at"):
        scheduler.set_timesteps(sigmas=[1e6, 1.0])


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({}, "exactly one of"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: must be at least 1"),
        ({"sigmas": [0.5, 0.9]}, "sigmas must give strictly decreasing times"),
        ({"sigmas": [1.2]}, r"times in \(0, 1\]"),
        ({"sigmas": [1.0], "timesteps": [1000.0]}, "exactly one of"),
    ],
)
def test_bad_schedules(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FlowMapScheduler().set_timesteps(**kwargs)


def test_bad_settings():
    with pytest.raises(ValueError, match="shift=0: must be positive"):
        FlowMapScheduler(shift=0)
    with pytest.raises(ValueError, match="did you mean 'DDIMScheduler'"):
        FlowMapScheduler(path={"_class_name": "DDIMSchedular"})
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="timestep=3.0 is not one of"):
        scheduler.step(torch.zeros(1), 3.0, torch.zeros(1))
