"""A scheduler made from the one that a model came with: the same timesteps, or a word about it."""

import json
import logging

import diffusers
import pytest
import torch

from genkit.interpolants import Linear
from genkit.pipelines.classic import set_schedule
from genkit.schedulers import ExactDenoiserScheduler, FlowMapScheduler, InterpolantScheduler, PseudoNumericalScheduler
from genkit.schedulers.origin import _warn
from genkit.testing import tiny

# scheduler_config.json of the models, what differs from the defaults.
FLOWS = {
    "sd3": ("sd3", dict(shift=3.0)),
    "sd3 dynamic": ("sd3", dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.4, max_shift=1.3)),
    "flux dev": ("flux", dict(shift=3.0, use_dynamic_shifting=True)),
    "flux schnell": ("flux", dict(shift=1.0)),
    "flux linear": ("flux", dict(use_dynamic_shifting=True, time_shift_type="linear", max_shift=2.0, base_shift=1.5)),
}


@pytest.mark.parametrize("cls", [ExactDenoiserScheduler, PseudoNumericalScheduler])
@pytest.mark.parametrize("case", FLOWS)
def test_flows_are_sampled_at_the_timesteps_of_their_own_scheduler(case, cls, tiny_pipeline, tmp_path):
    name, settings = FLOWS[case]
    pipe = tiny_pipeline(name)
    settings_of_solver = dict(solver_order=1) if cls is PseudoNumericalScheduler else {}
    original = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    ours = cls.from_scheduler(original, **settings_of_solver)
    ours.save_pretrained(tmp_path)
    from_config = cls.from_config(original.config, **settings_of_solver)
    for scheduler in (original, ours, cls.from_pretrained(tmp_path), from_config, cls.from_scheduler(ours)):
        visited = []
        pipe.scheduler = scheduler
        for steps in (1, 4):
            pipe(**tiny.call_arguments(name, steps) | dict(output_type="latent"))
            visited.append(scheduler.timesteps)
            for size in (16, 64):  # the shift depends on it
                set_schedule(pipe, (1, 4, size, size), steps, torch.device("cpu"))
                visited.append(scheduler.timesteps)
        if scheduler is original:
            wanted = visited
        for found, expected in zip(visited, wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("cls", [FlowMapScheduler, InterpolantScheduler])
def test_few_steps_of_flow_maps_and_sdes_are_spaced_by_themselves(cls):
    scheduler = cls.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert scheduler.config.timestep_spacing == "uniform" and scheduler.config.shift == 3.0


def test_mu_of_a_scheduler_without_origin():
    scheduler = ExactDenoiserScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.0)
    assert scheduler.times.tolist() == [1.0, 0.5, 0.0]


def test_saved_settings_of_the_shift_are_those_of_the_path(tmp_path):
    original = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.3)
    ExactDenoiserScheduler.from_scheduler(original).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["max_shift"] == config["path"]["max_shift"] == 1.3
    again = ExactDenoiserScheduler.from_pretrained(tmp_path)
    assert again.config.max_shift == 1.3 and again.config.use_dynamic_shifting


@pytest.mark.parametrize(
    "name, settings, word",
    [
        ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True), "use_karras_sigmas=True"),
        ("DPMSolverMultistepScheduler", dict(use_exponential_sigmas=True), "use_exponential_sigmas=True"),
        ("DPMSolverMultistepScheduler", dict(use_lu_lambdas=True), "use_lu_lambdas=True"),
        ("EulerDiscreteScheduler", dict(use_beta_sigmas=True), "use_beta_sigmas=True"),
        ("FlowMatchEulerDiscreteScheduler", dict(use_karras_sigmas=True), "use_karras_sigmas=True"),
        ("FlowMatchEulerDiscreteScheduler", dict(shift_terminal=0.1), "shift_terminal=0.1"),
        ("DPMSolverMultistepScheduler", dict(timestep_spacing="linspace"), "timestep_spacing='linspace'"),
        ("DPMSolverMultistepScheduler", dict(timestep_spacing="leading"), "timestep_spacing='leading'"),
        ("DPMSolverMultistepScheduler", dict(timestep_spacing="trailing"), None),
        ("DPMSolverMultistepScheduler", dict(use_flow_sigmas=True, prediction_type="flow_prediction"), None),
        ("EulerDiscreteScheduler", dict(timestep_spacing="linspace"), None),
        ("PNDMScheduler", dict(timestep_spacing="leading", steps_offset=1), None),
        ("HeunDiscreteScheduler", dict(timestep_spacing="trailing"), None),
        ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0), None),
        ("DDIMScheduler", {}, None),
    ],
)
def test_a_grid_that_is_lost_is_named_once(name, settings, word, caplog):
    _warn.cache_clear()
    original = getattr(diffusers, name)(**settings)
    with caplog.at_level(logging.WARNING, "genkit.schedulers"):
        for cls in (ExactDenoiserScheduler, ExactDenoiserScheduler, FlowMapScheduler):
            scheduler = cls.from_scheduler(original)
        ExactDenoiserScheduler.from_scheduler(scheduler)
    texts = [r.getMessage() for r in caplog.records]
    if word is None:
        assert not texts
        return
    assert len(texts) == 2 and all(
        f"{word} of {name}" in text and "set_timesteps(sigmas=...)" in text for text in texts
    )
    assert texts[0].startswith("ExactDenoiserScheduler") and texts[1].startswith("FlowMapScheduler")


def test_sigmas_keep_the_grid():
    """What the warning advises."""
    original = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    original.set_timesteps(8)
    ours = ExactDenoiserScheduler.from_scheduler(original)
    ours.set_timesteps(sigmas=original.sigmas.tolist())
    path, t = ours.interpolant, ours.times[:-1]
    torch.testing.assert_close((path.sigma(t) / path.alpha(t)).float(), original.sigmas[:-1], rtol=1e-4, atol=0)


def test_a_flow_solver_of_another_family_can_be_spaced():
    original = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, timestep_spacing="linspace", flow_shift=3.0)
    ours = ExactDenoiserScheduler.from_scheduler(original)
    assert isinstance(ours.interpolant, Linear) and ours.config.timestep_spacing == "uniform"
    ours.set_timesteps(6)
    original.set_timesteps(6)
    assert ours.timesteps.tolist() == pytest.approx(original.timesteps.tolist(), abs=2)
