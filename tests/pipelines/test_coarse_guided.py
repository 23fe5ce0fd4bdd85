"""Coarse image in, image out."""

import diffusers
import numpy
import pytest
import torch
from PIL import Image

from genkit.guidance import CFG, guided
from genkit.guidance.coarse import encode_reference, resize
from genkit.guidance.h_transform import HTransform
from genkit.networks.dit import DiT
from genkit.pipelines import CoarseGuidedPipeline
from genkit.rng import ItemRNG
from genkit.testing import tiny

NAMES = ("sd15", "sdxl", "sd3", "flux")
ALL = pytest.mark.parametrize("name", NAMES)


def own(pipe, **overrides):
    new = CoarseGuidedPipeline.from_pipe(pipe, **overrides)
    new.set_progress_bar_config(disable=True)
    return new


def coarse(n=1, size=8):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def call(pipe, name, image, **changes):
    settings = tiny.call_arguments(name, 3) | dict(output_type="latent") | changes
    return pipe(image, **settings).images


def reference(pipe, image):
    return encode_reference(pipe.vae, image * 2 - 1, (32, 32))


@ALL
def test_a_reference_of_full_weight_is_what_comes_out(name, tiny_pipeline):
    pipe = own(tiny_pipeline(name))
    if name == "sd15":  # as it comes, it stops at some noise
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    got = call(pipe, name, coarse(), exponent=0.0)
    assert (got - reference(pipe, coarse())).abs().max() < 1e-5 * max(1, got.abs().max())
    weaker = call(pipe, name, coarse(), exponent=1.0)
    assert (weaker - got).abs().max() > 0.1


@ALL
def test_the_classic_hook_makes_the_same(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    rule = dict(name="apg", guidance_scale=6.0)
    guider = HTransform(exponent=3.0, rule=rule)
    scale = "true_cfg_scale" if name == "flux" else "guidance_scale"
    settings = tiny.call_arguments(name, 3) | {scale: 2.0, "negative_prompt": "two dogs"}
    with guided(pipe, guider.using(reference=reference(pipe, coarse()))):
        hooked = pipe(**settings).images
    mine = call(own(pipe), name, coarse(), guider=guider, negative_prompt="two dogs", output_type="np")
    assert numpy.abs(mine - hooked).max() < 1e-5


def test_several_images_prompts_and_copies(tiny_pipeline):
    pipe = own(tiny_pipeline("sd3"))
    two, generators = coarse(2), lambda items: ItemRNG(0, items).generators()  # noqa: E731
    whole = call(pipe, "sd3", two, num_images_per_prompt=2, generator=generators(range(4)), exponent=2.0)
    second = call(pipe, "sd3", two[1:], num_images_per_prompt=2, generator=generators([2, 3]), exponent=2.0)
    assert len(whole) == 4 and (whole[2:] - second).abs().max() < 1e-5
    told = call(pipe, "sd3", two, prompt=["a cat", "a cat"], generator=generators([0, 2]), exponent=2.0)
    assert (told - whole[::2]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="3 prompts or labels for 2 images"):
        call(pipe, "sd3", two, prompt=["a", "b", "c"])


def test_forms_of_an_image(tiny_pipeline):
    pipe = own(tiny_pipeline("sd15"))
    bits = (coarse() * 255).round().byte()[0].permute(1, 2, 0).numpy()
    pil, array = Image.fromarray(bits), bits[None].astype("float32") / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    results = [call(pipe, "sd15", image) for image in (pil, [pil], array, tensor)]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-5, atol=1e-5)
    assert pipe(pil, **tiny.call_arguments("sd15", 1) | dict(output_type="pil")).images[0].size == (32, 32)
    transparent = pil.convert("RGBA")
    torch.testing.assert_close(call(pipe, "sd15", transparent), results[0], rtol=1e-5, atol=1e-5)


def test_masks_keep_a_region(tiny_pipeline):
    pipe = own(tiny_pipeline("sd3"))
    left = torch.zeros(1, 1, 32, 32)
    left[..., :16] = 1
    got = call(pipe, "sd3", coarse(), masks=[left], exponent=[0.0, 30.0])
    y = reference(pipe, coarse())
    assert (got - y)[..., :8].abs().max() < 1e-4 and (got - y)[..., 8:].abs().mean() > 0.1
    drawn = Image.fromarray(left[0, 0].mul(255).byte().numpy())
    assert torch.equal(call(pipe, "sd3", coarse(), masks=[drawn], exponent=[0.0, 30.0]), got)
    with pytest.raises(ValueError, match="as many masks as exponents"):
        call(pipe, "sd3", coarse(), masks=[left], exponent=2.0)


def test_pixels_and_labels():
    torch.manual_seed(0)
    net = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    pipe = CoarseGuidedPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), transformer=net)
    pipe.set_progress_bar_config(disable=True)
    small = torch.rand(1, 1, 4, 4)
    settings = dict(class_labels=3, num_inference_steps=4, output_type="latent", latents=torch.randn(1, 1, 8, 8))
    got = pipe(small, exponent=0.0, **settings).images
    torch.testing.assert_close(got, resize(small * 2 - 1, (8, 8)), rtol=1e-5, atol=1e-5)
    sketch = Image.fromarray((small[0, 0] * 255).byte().numpy()).convert("RGB")  # made gray
    assert pipe(sketch, **settings).images.shape == (1, 1, 8, 8)
    guided = pipe(small, exponent=2.0, guidance_scale=3.0, **settings)
    assert guided.network_calls == 8 and (guided.images - got).abs().max() > 0.1


def test_embedded_guidance_of_flux_needs_no_negative_prompt(tiny_pipeline):
    pipe = own(tiny_pipeline("flux"))
    weak, strong = (call(pipe, "flux", coarse(), guidance_scale=w, exponent=4.0) for w in (1.0, 9.0))
    assert not torch.equal(weak, strong)


def test_saved_and_loaded_in_a_fresh_process(tiny_pipeline, tmp_path, fresh_process):
    expected = {}
    for name in NAMES:
        pipe = own(tiny_pipeline(name), guider=HTransform(exponent=2.0, guidance_scale=3.0))
        expected[name] = call(pipe, name, coarse(), negative_prompt="two dogs")
        pipe.save_pretrained(tmp_path / name)
    got = fresh_process(
        "from genkit.pipelines import CoarseGuidedPipeline\n"
        "from genkit.testing import tiny\n"
        "image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))\n"
        "made = {}\n"
        f"for name in {NAMES!r}:\n"
        f"    pipe = CoarseGuidedPipeline.from_pretrained({str(tmp_path)!r} + '/' + name)\n"
        "    settings = tiny.call_arguments(name, 3) | dict(output_type='latent', negative_prompt='two dogs')\n"
        "    made[name] = pipe(image, **settings).images.tolist()\n"
        "print(json.dumps(made))"
    )
    for name in NAMES:
        assert (torch.tensor(got[name]) - expected[name]).abs().max() < 1e-5 * expected[name].abs().max()


def test_offload(tiny_pipeline):
    pipe = own(tiny_pipeline("sdxl"))
    expected = call(pipe, "sdxl", coarse())
    pipe.enable_model_cpu_offload(device="cpu")
    assert (call(pipe, "sdxl", coarse()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(image=torch.rand(1, 4, 8, 8)), "image has 4 channels, the model 3"),
        (dict(image=torch.rand(1, 3, 8, 8) - 1), r"accepted are tensors in \[0, 1\]"),
        (dict(guider=CFG()), "guider=CFG: accepted is an HTransform"),
        (dict(exponent=-1.0), "exponent=-1.0"),
        (dict(guider=HTransform(rule={"name": "cfg"}), guidance_scale=2.0), "has a scale of its own"),
        (dict(masks=[torch.full((1, 1, 32, 32), 0.5)], exponent=[1.0, 2.0]), "other than 0 and 1"),
        (dict(height=31), "height=31"),
        (dict(etta=1.0), "did you mean 'eta'|argument='etta'"),
    ],
)
def test_bad_input_is_refused_before_the_first_call(settings, message, tiny_pipeline):
    pipe = own(tiny_pipeline("sd3"))
    pipe.network.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        call(pipe, "sd3", **dict(image=coarse()) | settings)
