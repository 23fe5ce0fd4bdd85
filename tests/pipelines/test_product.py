"""Products of two models, or of one model under two prompts."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from genkit.guidance import CFG
from genkit.pipelines import FeynmanKacPipeline, ProductPipeline
from genkit.rng import ItemRNG
from genkit.testing import tiny
from tests.pipelines.gaussians import GaussianNetwork
from tests.pipelines.test_feynman_kac import NAMES, SIGMAS, inputs


def own(pipe, **overrides):
    new = ProductPipeline.from_pipe(pipe, **overrides)
    new.set_progress_bar_config(disable=True)
    return new


def network_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def gaussians(two_networks):
    means, stds = [1.0, -0.5], [1.0, 0.8]
    if two_networks:
        first, second = (GaussianNetwork(means=[m], stds=[s]) for m, s in zip(means, stds, strict=True))
    else:
        first, second = GaussianNetwork(means=means, stds=stds), None
    pipe = ProductPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=first, network_2=second)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("two_networks", [True, False])
def test_particles_follow_the_product(two_networks):
    out = gaussians(two_networks)(
        class_labels=[0] * 3,
        second_class_labels=None if two_networks else [1] * 3,
        num_particles=4000,
        sigmas=SIGMAS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    x = out.images.view(3, 4000)
    mean = (out.weights * x).sum(1)
    variance = (out.weights * (x - mean[:, None]) ** 2).sum(1)
    # Exact: 0.0854, 0.3902, difference of log Z 2.411; three standard errors of three runs, and the bias of the steps.
    assert abs(mean.mean().item() - 0.0854) < 0.08
    assert abs(variance.mean().item() - 0.3902) < 0.08
    assert abs(out.log_z.mean().item() - 2.411) < 0.25
    assert out.network_calls == 400


@pytest.mark.parametrize("name", NAMES)
def test_two_equal_models_with_half_exponents_are_one(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    twice = own(pipe, network_2=network_of(tiny_pipeline(name)), exponents=[0.5, 0.5])
    once = FeynmanKacPipeline.from_pipe(pipe)
    once.set_progress_bar_config(disable=True)
    rng = lambda: ItemRNG(0, range(2)).generators()  # noqa: E731
    a = twice(**inputs(name, num_particles=2, generator=rng()))
    b = once(**inputs(name, num_particles=2, generator=rng()))
    torch.testing.assert_close(a.images, b.images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.weights, b.weights, rtol=1e-5, atol=1e-6)
    assert a.network_calls == 2 * b.network_calls


def test_two_prompts_and_two_models_together(tiny_pipeline):
    pipe = own(tiny_pipeline("sdxl"), network_2=tiny.pipeline("sdxl", seed=1).unet)
    rng = lambda: ItemRNG(0, range(2)).generators()  # noqa: E731
    settings = inputs("sdxl", prompt=["a cat", "a dog"], num_particles=2)
    plain = pipe(**settings | dict(generator=rng()))
    for second in ("fog", ["fog", "fog"]):
        foggy = pipe(**settings | dict(generator=rng()), second_prompt=second)
        assert (foggy.images - plain.images).abs().max() > 1e-4 and foggy.weights.shape == (2, 2)
    same = pipe(**settings | dict(generator=rng()), second_prompt=["a cat", "a dog"])
    torch.testing.assert_close(same.images, plain.images, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_in_a_fresh_process(tiny_pipeline, tmp_path, fresh_process):
    pipe = own(tiny_pipeline("sd3"), network_2=tiny.pipeline("sd3", seed=1).transformer, exponents=[1.0, 0.5])
    expected = pipe(**inputs("sd3", num_particles=2))
    pipe.save_pretrained(tmp_path)
    got = fresh_process(
        "from genkit.pipelines import ProductPipeline\n"
        "from genkit.testing import tiny\n"
        f"pipe = ProductPipeline.from_pretrained({str(tmp_path)!r})\n"
        "told = tiny.call_arguments('sd3', 3) | dict(output_type='latent', negative_prompt='two dogs')\n"
        "out = pipe(num_particles=2, **told)\n"
        "print(json.dumps([out.images.tolist(), out.weights.tolist(), list(pipe.config.exponents)]))"
    )
    torch.testing.assert_close(torch.tensor(got[0]), expected.images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(got[1], dtype=torch.float64), expected.weights, rtol=1e-3, atol=1e-3)
    assert got[2] == [1.0, 0.5]


def test_offload(tiny_pipeline):
    pipe = own(tiny_pipeline("sd3"), network_2=tiny.pipeline("sd3", seed=1).transformer)
    expected = pipe(**inputs("sd3", num_particles=2)).images
    pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(pipe(**inputs("sd3", num_particles=2)).images, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "the two densities are the same"),
        (dict(second_prompt="fog", guidance_scale=3.0), "leave them out"),
        (dict(second_prompt="fog", guider=CFG()), "leave them out"),
        (dict(second_prompt=["fog", "sun"]), "2 second prompts or labels for 1 first ones"),
        (dict(second_class_labels=[1]), "takes a prompt"),
        (dict(second_prompt="fog", num_particles=0), "num_particles=0"),
    ],
)
def test_bad_input_is_refused_before_the_first_call(settings, message, tiny_pipeline):
    pipe = own(tiny_pipeline("sd15"))
    pipe.network.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(**inputs("sd15") | settings)


def test_exponents_that_are_no_density_and_networks_of_another_kind(tiny_pipeline):
    with pytest.raises(ValueError, match="must be two numbers"):
        own(tiny_pipeline("sd15"), exponents=[1.0])
    with pytest.raises(ValueError, match="a sum above 0"):
        own(tiny_pipeline("sd15"), exponents=[1.0, -1.0])
    pipe = own(tiny_pipeline("sd15"), network_2=tiny_pipeline("sd3").transformer)
    with pytest.raises(ValueError, match="flow"):
        pipe(**inputs("sd15"))
