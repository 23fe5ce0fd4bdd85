"""Autoguidance: closed forms in float64, the three ways to use it, and weaker models that do not fit."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from genkit.denoisers import FunctionDenoiser, from_pipeline
from genkit.denoisers.base import Condition
from genkit.denoisers.flux import pack
from genkit.guidance import APG, CFG, Point, attach, guided
from genkit.guidance.autoguidance import Autoguidance
from genkit.interpolants import DiscreteVP, Linear, Trigonometric
from genkit.networks.dit import DiT
from genkit.pipelines import ClassConditionalPipeline
from genkit.sampling import sample
from genkit.testing import tiny
from genkit.testing.oracles import Gaussian, GaussianMixture
from tests.guidance.test_guiders import condition, field, noise, walk
from tests.guidance.test_hooks import Moves
from tests.guidance.ways import own_inputs, own_latents

F64 = torch.float64
T = torch.tensor(0.6, dtype=F64)


def network_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [Linear(), Trigonometric()])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_it_follows_the_ratio_of_the_two_densities(kind, path):
    """``score = grad log p^w / p_weak^(w-1)``; of two Gaussians that is one more Gaussian's."""
    mean, c, weak_c, w = torch.tensor([1.0, -2.0], dtype=F64), 0.5, 0.8, 2.0
    strong, weak = (Gaussian(mean, std, interpolant=path).denoiser(kind) for std in (c, weak_c))
    x = torch.randn(5, 2, dtype=F64)
    guided, _ = (
        Autoguidance(guidance_scale=w).using(weak=weak).guide(Point(strong, x, T, None, None, Condition()), None)
    )
    a, s = path.alpha(T), path.sigma(T)
    precision = w / (a**2 * c**2 + s**2) - (w - 1) / (a**2 * weak_c**2 + s**2)
    torch.testing.assert_close(guided.prediction.score, -precision * (x - a * mean), rtol=1e-11, atol=1e-11)
    gap = (a / s**2) * (guided.parts["cond"].sample - guided.parts["weak"].sample)
    ratio = Gaussian(mean, c, interpolant=path).score(x, T) - Gaussian(mean, weak_c, interpolant=path).score(x, T)
    torch.testing.assert_close(gap, ratio, rtol=1e-11, atol=1e-11)
    assert strong.calls == 2 and weak.calls == 0


def test_the_scale_is_how_far_from_the_weaker_prediction():
    strong, weak, x, cond = field(), field(), noise(), condition()
    weak = FunctionDenoiser(lambda x, t, shift: torch.sin(x + shift), Linear(), "flow_prediction")
    d, d_weak = (network(x, T, cond).raw for network in (strong, weak))
    for w in (1.5, 3.0):
        got, _ = Autoguidance(guidance_scale=w).using(weak=weak).guide(Point(strong, x, T, None, None, cond), None)
        torch.testing.assert_close(got.prediction.raw, d_weak + w * (d - d_weak), rtol=1e-13, atol=1e-13)


def test_the_network_as_its_own_weaker_one_changes_nothing():
    strong, x, cond = field(), noise(), condition()
    plain, _ = walk(CFG(enabled=False), strong, x, cond)
    assert torch.equal(walk(Autoguidance(guidance_scale=4.0).using(weak=strong), strong, x, cond)[0], plain)


def test_a_rule_is_added_to():
    strong, x, cond = field(), noise(), condition()
    weak = FunctionDenoiser(lambda x, t, shift: torch.sin(x + shift), Linear(), "flow_prediction")
    c, u = (d.raw for d in strong.many(x, T, [cond, cond.null()]))
    d_weak = weak(x, T, cond).raw
    strong.calls = 0
    guider = Autoguidance(guidance_scale=2.5, rule={"name": "cfg", "guidance_scale": 3.0}).using(weak=weak)
    got, _ = guider.evaluate(Point(strong, x, T, None, None, cond), None)
    torch.testing.assert_close(got.prediction.raw, u + 3 * (c - u) + 1.5 * (c - d_weak), rtol=1e-13, atol=1e-13)
    assert guider.needs_uncond and guider.stats()["network_calls"].tolist() == [3]
    alone = guider.new(guidance_scale=1.0)
    assert not alone.neutral
    got, _ = alone.guide(Point(strong, x, T, None, None, cond), None)
    torch.testing.assert_close(got.prediction.raw, u + 3 * (c - u), rtol=1e-13, atol=1e-13)


def test_a_rule_that_remembers_keeps_its_state():
    """APG's momentum along a walk; with the network as its own weaker one only the rule is left."""
    strong, x, cond = field(), noise(), condition()
    rule = {"name": "apg", "guidance_scale": 6.0, "momentum": -0.7}
    with_rule = Autoguidance(guidance_scale=3.0, rule=rule).using(weak=strong)
    settings = {k: v for k, v in rule.items() if k != "name"}

    expected, state = walk(APG(**settings), strong, x, cond)
    got, own = walk(with_rule, strong, x, cond)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.gather(torch.tensor([1, 1])).after, state.after[[1, 1]], rtol=1e-12, atol=1e-12)


def test_both_networks_are_asked_where_a_rule_moved_the_point():
    strong, x, cond = field(), noise(), condition()
    weak = FunctionDenoiser(lambda x, t, shift: torch.sin(x + shift), Linear(), "flow_prediction")
    guider = Autoguidance(guidance_scale=2.0).using(weak=weak)
    vars(guider)["inner"] = Moves(guidance_scale=3.0)
    got, _ = guider.guide(Point(strong, x, T, None, None, cond), None)
    moved, _ = Moves(guidance_scale=3.0).guide(Point(strong, x, T, None, None, cond), None)
    z = moved.z
    expected = moved.prediction.raw + strong(z, T, cond).raw - weak(z, T, cond).raw
    torch.testing.assert_close(got.prediction.raw, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(got.z, z)


def test_guidance_concentrates_samples_where_the_weaker_model_spreads_them():
    """On a mixture whose weaker model has too wide components: fewer samples far from the modes, both modes kept."""
    means = torch.tensor([[1.5, 0.0], [-1.5, 0.0]], dtype=F64)
    strong, weak = (GaussianMixture(means, std).denoiser() for std in (0.3, 0.5))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    spread = []
    for w in (1.0, 2.0, 3.0):
        scheduler.set_timesteps(sigmas=[1 - k / 50 for k in range(50)])
        x = torch.randn(2000, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
        x = sample(strong, scheduler, x, guider=Autoguidance(guidance_scale=w).using(weak=weak))
        spread.append((x - means[(x[:, 0] < 0).long()]).square().mean().sqrt().item())
        assert 0.45 < (x[:, 0] > 0).double().mean() < 0.55
    # At scale w the precision at t = 0 is w / 0.09 - (w - 1) / 0.25, which the trajectories approach.
    assert spread[0] == pytest.approx(0.3, abs=0.02) and spread[0] > spread[1] + 0.03 > spread[2] + 0.06


# -- three ways -----------------------------------------------------------------------------------------------------

RULES = [None, {"name": "cfg", "guidance_scale": 3.0}]


def weak_network(name):
    return network_of(tiny.pipeline(name, seed=1))


@pytest.mark.parametrize("rule", RULES, ids=["alone", "cfg"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_three_ways_make_the_same_latents(name, rule, tiny_pipeline, run_modular, run_pipeline, relative):
    pipe = tiny_pipeline(name)
    guider = Autoguidance(guidance_scale=2.5, rule=rule).using(weak=weak_network(name))
    with guided(pipe, guider) as run:
        hooked = run_pipeline(pipe, name)
    assert run.stats()["network_calls"].tolist() == [3, 3, 3]  # the pipeline makes both branches in any case
    with guided(pipe, CFG(**{} if rule is None else dict(guidance_scale=3.0))):
        assert relative(run_pipeline(pipe, name), hooked) > 1e-2
    x, cond = own_inputs(pipe, name)
    denoiser = from_pipeline(pipe)
    own = sample(denoiser, pipe.scheduler, x, cond, guider=guider)
    assert relative(own, hooked) < 1e-5
    assert denoiser.calls == (6 if rule is None else 9)
    if name != "sd15":  # which has no modular pipeline
        assert relative(run_modular(name, guider), hooked) < 1e-5


@pytest.mark.parametrize("rule", RULES, ids=["alone", "cfg"])
def test_flux(rule, tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline("flux")
    guider = Autoguidance(guidance_scale=2.5, rule=rule).using(weak=weak_network("flux"))
    with guided(pipe, guider):
        hooked = run_pipeline(pipe, "flux")
    assert relative(own_latents(pipe, "flux", guider), hooked) < 1e-5
    if rule is None:  # no unconditional branch is needed: guidance-distilled networks can be guided so
        x, _ = own_inputs(pipe, "flux")
        denoiser = from_pipeline(pipe)
        single = denoiser.encode(pipe, "a cat", max_sequence_length=16)
        assert relative(pack(sample(denoiser, pipe.scheduler, x, single, guider=guider)), hooked) < 1e-5


def test_a_denoiser_is_as_good_as_its_network(tiny_pipeline, run_pipeline):
    pipe, weak = tiny_pipeline("sd3"), tiny.pipeline("sd3", seed=1)
    images = []
    for model in (weak.transformer, from_pipeline(weak)):
        with guided(pipe, Autoguidance().using(weak=model)):
            images.append(run_pipeline(pipe, "sd3"))
    assert torch.equal(*images)


def test_class_conditional_pipelines(tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline("dit")
    guider = Autoguidance(guidance_scale=3.0).using(weak=weak_network("dit"))
    with guided(pipe, guider):
        hooked = run_pipeline(pipe, "dit")
    own = ClassConditionalPipeline(pipe.transformer, pipe.scheduler, vae=pipe.vae)
    own.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = own([1], 3, latents=x, guider=guider, output_type="np").images
    assert relative(torch.from_numpy(latents), hooked) < 1e-4  # of images, behind a decoder


def test_saved_and_loaded_in_a_fresh_process(tiny_pipeline, run_pipeline, tmp_path):
    pipe = tiny_pipeline("sd15")
    guider = Autoguidance(guidance_scale=2.5, rule={"name": "apg", "guidance_scale": 4.0, "momentum": -0.3})
    with guided(pipe, guider.using(weak=weak_network("sd15"))):
        expected = run_pipeline(pipe, "sd15")
    guider.save_pretrained(tmp_path / "guider")
    tiny.pipeline("sd15", seed=1).unet.save_pretrained(tmp_path / "weak")
    code = f"""
    import torch, genkit
    torch.set_num_threads(1)
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from genkit.testing import tiny
    pipe = tiny.pipeline("sd15")
    weak = UNet2DConditionModel.from_pretrained({str(tmp_path / "weak")!r})
    with genkit.guided(pipe, genkit.load_guider({str(tmp_path / "guider")!r}).using(weak=weak)):
        settings = tiny.call_arguments("sd15", 3) | dict(output_type="latent", negative_prompt="two dogs")
        images = pipe(**settings, guidance_scale=2.0).images
    save_file({{"images": images}}, {str(tmp_path / "out.safetensors")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True)
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["images"], expected, rtol=1e-5, atol=1e-5)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(guidance_scale=0.9), "guidance_scale=0.9: accepted is 1 <= guidance_scale"),
        (dict(rule={"name": "cgf"}), r"rule\['name'\]='cgf' is not known; did you mean 'cfg'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Autoguidance(**settings)


def sd15(**changes):
    unet = tiny.pipeline("sd15").unet
    return diffusers.UNet2DConditionModel.from_config(unet.config, **changes)


def other_betas():
    return DiscreteVP(diffusers.DDIMScheduler().alphas_cumprod)


BAD = {
    "kind": (lambda d: weak_network("sd3"), "weak=SD3Transformer2DModel: accepted is a network of the kind .* UNet2D"),
    "channels": (lambda d: sd15(in_channels=9), "in_channels=9: accepted is that of the guided network, 4"),
    "text": (lambda d: sd15(cross_attention_dim=16), "cross_attention_dim=16: .* 32"),
    "path": (lambda d: from_pipeline(tiny.pipeline("sd3")), "weak=SD3 on the path Linear: accepted .* DiscreteVP"),
    "noise": (lambda d: type(d)(sd15(), other_betas(), "epsilon"), "on the path DiscreteVP: .* same alpha and sigma"),
    "type": (lambda d: type(d)(sd15(), d.interpolant, "v_prediction"), "prediction_type='v_prediction': .*'epsilon'"),
    "pipeline": (lambda d: tiny.pipeline("sd15"), r"weak=StableDiffusionPipeline: .*from_pipeline\(pipe\)"),
    "nothing": (lambda d: "sd15", "weak=str: accepted is a network or a denoiser"),
}


@pytest.mark.parametrize("which", BAD)
def test_weaker_models_that_do_not_fit_are_refused_before_the_first_call(which, tiny_pipeline, run_pipeline):
    make, message = BAD[which]
    pipe, calls = tiny_pipeline("sd15"), []
    denoiser = from_pipeline(pipe)
    guider = Autoguidance().using(weak=make(denoiser))
    x, cond = own_inputs(pipe, "sd15")
    with pytest.raises(ValueError, match=message):
        sample(denoiser, pipe.scheduler, x, cond, guider=guider)
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message), guided(pipe, guider):
        run_pipeline(pipe, "sd15")
    assert not calls and denoiser.calls == 0


def test_modular_pipelines_refuse_before_the_first_call(modular_pipeline, run_pipeline):
    _, pipe = modular_pipeline("sd3")
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    attach(pipe, Autoguidance().using(weak=weak_network("sdxl")))
    with pytest.raises(ValueError, match="weak=UNet2DConditionModel: accepted is a network of the kind"):
        run_pipeline(pipe, "sd3")
    attach(pipe, Autoguidance())
    with pytest.raises(ValueError, match=r"lacks 'weak' \(a weaker network or denoiser\)"):
        run_pipeline(pipe, "sd3")
    assert not calls and not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize(
    ("changes", "message"),
    [(dict(sample_size=16), "sample_size=16: .* 8"), (dict(num_classes=5), "num_classes=5: .* 10")],
)
def test_class_conditional_networks_of_another_size_or_label_space(changes, message):
    small = dict(hidden_size=16, num_layers=1, num_heads=2, patch_size=4)
    pipe = ClassConditionalPipeline(DiT(**small), diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=message):
        pipe([1], 2, guider=Autoguidance().using(weak=DiT(**small, **changes)))


def test_no_unconditional_branch_is_missed_only_by_a_rule_that_needs_it(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    x, cond = own_inputs(pipe, "sd15")
    cond = replace(cond, null_values=None)
    guider = Autoguidance().using(weak=weak_network("sd15"))
    assert sample(from_pipeline(pipe), pipe.scheduler, x, cond, guider=guider).isfinite().all()
    guider = guider.new(rule={"name": "cfg", "guidance_scale": 3.0})
    denoiser = from_pipeline(pipe)
    with pytest.raises(ValueError, match="null_values=None"):
        sample(denoiser, pipe.scheduler, x, cond, guider=guider)
    assert denoiser.calls == 0


def test_what_moves_the_sample_inside_it_is_refused_like_outside(tiny_pipeline):
    guider = Autoguidance(rule={"name": "readout"})
    assert guider.moves_sample and not Autoguidance().moves_sample
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(tiny_pipeline("sd15").scheduler.config)
    with pytest.raises(ValueError, match="Autoguidance moves the sample"):
        guider.bind(scheduler)
