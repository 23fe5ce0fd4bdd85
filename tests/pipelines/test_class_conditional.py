"""The class-conditional pipeline as a Diffusers user calls it."""

import json
import subprocess
import sys

import diffusers
import numpy
import pytest
import torch

from genkit.guidance import CFG
from genkit.networks.dit import DiT
from genkit.pipelines import ClassConditionalPipeline
from genkit.rng import ItemRNG
from genkit.schedulers import FlowMapScheduler
from tests.ready import GUIDERS, ready

SMALL = dict(hidden_size=16, num_layers=1, num_heads=2, patch_size=4)


def network(**kwargs):
    torch.manual_seed(0)
    net = DiT(**SMALL, **kwargs)
    for p in net.parameters():  # zero-initialised layers would hide what depends on what
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


def make(scheduler=None, **kwargs):
    pipe = ClassConditionalPipeline(network(), scheduler or diffusers.FlowMatchEulerDiscreteScheduler(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(n):
    return ItemRNG(0, range(n)).normal((1, 8, 8))


def test_equals_plain_euler_on_equal_steps():
    pipe, x, y = make(), noise(3), torch.tensor([1, 5, 9])
    got = pipe(y, 4, latents=x, output_type="latent").images
    with torch.no_grad():
        for k in range(4):
            x = x - pipe.transformer(x, torch.full((3,), 1 - k / 4), None, y) / 4
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_a_flow_map_student_jumps():
    pipe, x, y = make(FlowMapScheduler()), noise(2), torch.tensor([1, 5])
    got = pipe(y, 2, latents=x, output_type="latent").images
    with torch.no_grad():
        for t, s in ((1.0, 0.5), (0.5, 0.0)):
            x = x + (s - t) * pipe.transformer(x, torch.full((2,), t), torch.full((2,), s), y)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_other_schedulers(scheduler):
    pipe = make(getattr(diffusers, scheduler)())
    assert torch.isfinite(pipe([0, 1], 4, latents=noise(2), output_type="latent").images).all()


def test_output_types():
    pipe = make()
    pil = pipe([0], 1, latents=noise(1)).images
    array = pipe([0], 1, latents=noise(1), output_type="np").images
    tensor = pipe([0], 1, latents=noise(1), output_type="pt", return_dict=False)[0]
    assert pil[0].size == (8, 8) and array.shape == (1, 8, 8, 1) and tensor.shape == (1, 1, 8, 8)
    assert 0 <= tensor.min() and tensor.max() <= 1
    assert numpy.abs(numpy.asarray(pil[0]) / 255 - array[0, ..., 0]).max() < 0.6 / 255


def test_images_do_not_depend_on_their_batch():
    for scheduler in (diffusers.DDPMScheduler(), FlowMapScheduler(stochastic=True)):
        pipe = make(scheduler)
        whole = pipe([3, 4, 5], 3, generator=ItemRNG(0, range(3)).generators(), output_type="latent").images
        alone = pipe([4], 3, generator=ItemRNG(0, [1]).generators(), output_type="latent").images
        torch.testing.assert_close(alone, whole[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders_by_call_and_as_component(name, tmp_path):
    pipe, x = make(), noise(2)
    guider = ready(GUIDERS[name], tuple(x.shape))
    by_call = pipe([1, 2], 3, latents=x, guider=guider, output_type="latent").images
    plain = pipe([1, 2], 3, latents=x, output_type="latent").images
    assert (by_call - plain).abs().max() > 1e-3
    make(guider=guider).save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.guider) is type(guider)
    again.guider = again.guider.using(**guider._given)
    torch.testing.assert_close(again([1, 2], 3, latents=x, output_type="latent").images, by_call, rtol=1e-5, atol=1e-5)


def test_saved_folder_loads_in_a_fresh_process(tmp_path):
    pipe = make(FlowMapScheduler(), id2label={str(i): f"digit {i}" for i in range(10)})
    pipe.save_pretrained(tmp_path)
    expected = pipe([7], 2, latents=noise(1), output_type="latent").images.flatten().tolist()
    code = (
        "import sys, json, genkit\n"
        "from genkit.pipelines import ClassConditionalPipeline\n"
        "from genkit.rng import ItemRNG\n"
        f"pipe = ClassConditionalPipeline.from_pretrained({str(tmp_path)!r})\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "labels, noise = pipe.get_label_ids(['digit 7']), ItemRNG(0, [0]).normal((1, 8, 8))\n"
        "x = pipe(labels, 2, latents=noise, output_type='latent')\n"
        "print(json.dumps(x.images.flatten().tolist()))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)


def test_callback_sees_and_replaces_latents_and_may_interrupt():
    pipe, seen = make(), []

    def callback(p, i, timestep, kwargs):
        seen.append((i, float(timestep)))
        if i == 1:
            p._interrupt = True
        return {"latents": torch.zeros_like(kwargs["latents"])}

    got = pipe([1], 4, latents=noise(1), callback_on_step_end=callback, output_type="latent").images
    assert seen == [(0, 1000.0), (1, 750.0)] and not got.any()


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(class_labels=[10]), r"class_labels=\[10\]: accepted are 0 to 9"),
        (dict(class_labels=[-1]), "accepted are 0 to 9"),
        (dict(class_labels=[]), "at least one image"),
        (dict(class_labels=None), "the network is conditional"),
        (dict(class_labels=[1], num_inference_steps=0), "num_inference_steps=0"),
        (dict(class_labels=[1], output_type="jpg"), "output_type='jpg'"),
        (dict(class_labels=[1], latents=torch.zeros(1, 1, 4, 4)), r"latents has shape \(1, 1, 4, 4\)"),
        (dict(class_labels=[1], generator=ItemRNG(0, [1, 2]).generators()), "2 entries for 1 images"),
        (dict(class_labels=[1], callback_on_step_end_tensor_inputs=("x",)), "accepted are"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make()(**kwargs)


def test_guidance_needs_an_unconditional_branch():
    pipe = ClassConditionalPipeline(network(num_classes=0), diffusers.FlowMatchEulerDiscreteScheduler())
    assert pipe(batch_size=2, num_inference_steps=1, output_type="latent").images.shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="no class|unconditional"):
        pipe(batch_size=2, num_inference_steps=1, guider=CFG(guidance_scale=2.0))
    with pytest.raises(ValueError, match="unconditional"):
        pipe([1], 1)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_latents_are_decoded_as_diffusers_does(scale, tiny_pipeline):
    classic = tiny_pipeline("dit")
    classic.set_progress_bar_config(disable=True)
    call = dict(class_labels=[1, 7], num_inference_steps=3, guidance_scale=scale)
    wanted = classic(**call, generator=torch.Generator().manual_seed(0), output_type="np").images
    pipe = ClassConditionalPipeline.from_pipe(classic)
    assert pipe.vae is classic.vae
    got = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert numpy.abs(got - wanted).max() < 1e-5


def test_unconditional_latents(tiny_pipeline):
    vae = tiny_pipeline("dit").vae
    net = network(num_classes=0, in_channels=4, sample_size=16)
    pipe = ClassConditionalPipeline(net, diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    call = dict(batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    z = pipe(**call, output_type="latent").images
    call["generator"] = torch.Generator().manual_seed(0)
    images = pipe(**call, output_type="pt").images
    with torch.no_grad():
        decoded = vae.decode(z / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))


def test_get_label_ids_names_what_it_knows():
    with pytest.raises(ValueError, match="digit 11"):
        make(id2label={"0": "digit 0"}).get_label_ids(["digit 11"])
