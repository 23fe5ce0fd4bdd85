"""Weighted h-transform guidance: the three ways to use it, and what is refused."""

import subprocess
import sys
import textwrap

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from genkit.guidance import CFG, attach, guided
from genkit.guidance.h_transform import HTransform
from genkit.sampling import sample
from genkit.testing.oracles import Gaussian
from tests.guidance.ways import own_latents

# -- three ways -----------------------------------------------------------------------------------------------------


def made(**settings):
    """Two regions and a reference of 16 x 16 latents; the same at every call."""
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(1, 4, 16, 16, generator=generator)
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 3:9, 5:12] = True
    settings = dict(exponent=[2.0, 6.0], guidance_scale=3.0) | settings
    return HTransform(**settings).using(reference=reference, masks=mask)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_three_ways_make_the_same_latents(name, tiny_pipeline, run_modular, run_pipeline, relative):
    pipe, guider = tiny_pipeline(name), made()
    with guided(pipe, guider) as run:
        hooked = run_pipeline(pipe, name)
    assert run.stats()["network_calls"].tolist() == [2, 2, 2] and run.stats()["weight_0"].isfinite().all()
    with guided(pipe, CFG(guidance_scale=3.0)):
        assert relative(run_pipeline(pipe, name), hooked) > 1e-2
    assert relative(own_latents(pipe, name, guider), hooked) < 1e-5
    if name != "sd15":  # which has no modular pipeline
        assert relative(run_modular(name, guider), hooked) < 1e-5


def test_flux_packed_and_not(tiny_pipeline, run_pipeline, relative):
    pipe, guider = tiny_pipeline("flux"), made()
    with guided(pipe, guider):
        hooked = run_pipeline(pipe, "flux")
    assert relative(own_latents(pipe, "flux", guider), hooked) < 1e-5
    with guided(pipe, CFG(guidance_scale=3.0)):
        assert relative(run_pipeline(pipe, "flux"), hooked) > 1e-2


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_solvers_with_memory_store_the_mixture(scheduler, tiny_pipeline, run_pipeline, relative):
    pipe, guider = tiny_pipeline("sd15"), made()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with guided(pipe, guider):
        hooked = run_pipeline(pipe, "sd15")
    own = own_latents(pipe, "sd15", guider)
    assert relative(own, hooked) < 1e-5


def test_full_weight_in_a_pipeline_returns_the_reference(tiny_pipeline, run_pipeline):
    pipe, guider = tiny_pipeline("sd3"), made(exponent=0.0).using(masks=None)
    with guided(pipe, guider):
        latents = run_pipeline(pipe, "sd3")
    torch.testing.assert_close(latents, guider.given("reference"), rtol=1e-4, atol=1e-5)


def test_saved_and_reloaded_in_a_fresh_process(modular_pipeline, run_pipeline, relative, tmp_path):
    classic, modular = modular_pipeline("sd3")
    guider = made(reference_stop=0.9)
    with guided(classic, guider):
        expected = run_pipeline(classic, "sd3")
    attach(modular, guider)
    modular.save_pretrained(str(tmp_path / "modular"), overwrite_modular_index=True)
    given = {"reference": guider.given("reference"), "masks": guider.given("masks").float()}
    save_file(given, tmp_path / "given.safetensors")
    code = f"""
    import torch, genkit
    torch.set_num_threads(1)
    from diffusers import ModularPipeline
    from safetensors.torch import load_file
    from genkit.testing import tiny
    folder = {str(tmp_path)!r}
    given = load_file(folder + "/given.safetensors")
    settings = lambda: tiny.call_arguments("sd3", 3) | dict(output_type="latent", negative_prompt="two dogs")
    pipe = ModularPipeline.from_pretrained(folder + "/modular")
    pipe.load_components()
    try:
        pipe(**settings(), output="images")
    except Exception as error:
        print(error)
    pipe.update_components(guider=pipe.guider.using(**given))
    results = {{"modular": pipe(**settings(), output="images")}}
    classic = tiny.pipeline("sd3")
    with genkit.guided(classic, genkit.load_guider(folder + "/modular/guider").using(**given)):
        results["classic"] = classic(**settings(), guidance_scale=2.0).images
    torch.save(results, folder + "/results.pt")
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "HTransform lacks 'reference'" in child.stdout
    for kind, latents in torch.load(tmp_path / "results.pt", weights_only=True).items():
        assert relative(latents, expected) < 1e-5, kind


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(exponent=-1.0), "exponent=-1.0: accepted is 0 <= exponent"),
        (dict(exponent=[2.0, -1.0]), "exponent=-1.0"),
        (dict(exponent=[]), r"exponent=\[\]: accepted is a number, or one a region"),
        (dict(guidance_scale=-1.0), "guidance_scale=-1.0"),
        (dict(reference_start=1.5), "reference_start=1.5"),
        (dict(reference_start=0.5, reference_stop=0.2), "reference_stop=0.2: accepted is 0.5 <= reference_stop <= 1"),
        (dict(rule={"name": "agp"}), r"rule\['name'\]='agp' is not known; did you mean 'apg'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        HTransform(**settings)


Y = torch.zeros(1, 4, 16, 16)
M = torch.ones(1, 1, 16, 16)
BAD = {
    "size": (
        dict(reference=Y[..., 1:]),
        None,
        r"reference has shape \(1, 4, 16, 15\).*accepted is \(1 or 1, 4, 16, 16\)",
    ),
    "channels": (dict(reference=Y[:, 1:]), None, r"reference has shape \(1, 3, 16, 16\)"),
    "rows": (dict(reference=Y.repeat(3, 1, 1, 1)), None, r"reference has shape \(3, 4, 16, 16\)"),
    "integers": (dict(reference=Y.to(torch.uint8)), None, "reference=torch.uint8: accepted is .* of floating point"),
    "no_tensor": (dict(reference="cat.png"), None, "reference=str: accepted is a tensor"),
    "not_finite": (dict(reference=Y / 0), None, "reference has values that are not finite"),
    "no_mask": (dict(reference=Y), [2.0, 4.0], r"masks are 0 .* is for 2: accepted are as many masks as exponents"),
    "mask_for_one": (dict(reference=Y, masks=M), 2.0, "masks are 2 .* is for 1"),
    "too_few": (dict(reference=Y, masks=[M, M]), [1.0, 2.0, 3.0], "masks are 2 .* is for 3"),
    "overlap": (dict(reference=Y, masks=[M, M]), [1.0, 2.0], "must partition .* sums up to 1 off"),
    "hole": (dict(reference=Y, masks=[M, 0 * M - 0.25]), [1.0, 2.0], "got a least value of -0.25"),
    "nan": (dict(reference=Y, masks=[M, M / 0 * 0]), [1.0, 2.0], "must partition"),
    "mask_size": (dict(reference=Y, masks=M[..., 1:]), [1.0, 2.0], r"a mask has shape \(1, 1, 16, 15\): accepted is"),
    "mask_axes": (dict(reference=Y, masks=M[0]), [1.0, 2.0], r"a mask has shape \(1, 16, 16\)"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("way", ["sd15", "flux", "loop"])
def test_bad_input_is_refused_before_the_first_call(case, way, tiny_pipeline, run_pipeline):
    given, exponent, message = BAD[case]
    guider = HTransform(exponent=exponent).using(**given)
    if way == "flux" and case in ("size", "channels"):
        message = r"accepted is \(1 or 1, 4, H, W\) of an even size and 64 patches"
    if way == "loop":
        law = Gaussian(torch.zeros(4, 16, 16), 1.0)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(2)
        denoiser = law.denoiser()
        with pytest.raises(ValueError, match=message):
            sample(denoiser, scheduler, torch.randn(1, 4, 16, 16), guider=guider.new(guidance_scale=1.0))
        assert denoiser.calls == 0
        return
    pipe, calls = tiny_pipeline(way), []
    network = getattr(pipe, "unet", None) or pipe.transformer
    network.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message), guided(pipe, guider):
        run_pipeline(pipe, way)
    assert not calls


def test_a_guidance_distilled_pipeline_is_refused(tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline("flux")
    with pytest.raises(ValueError, match="without true classifier-free guidance"), guided(pipe, made()):
        run_pipeline(pipe, "flux", true_cfg_scale=1.0)
