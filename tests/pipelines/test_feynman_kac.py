"""Particles from pipelines: right on closed forms, plain sampling where there is nothing to correct."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from genkit.feynman_kac import FKC, FKSteering
from genkit.guidance import APG, CFG
from genkit.pipelines import FeynmanKacPipeline, TextToImagePipeline
from genkit.rng import ItemRNG
from genkit.schedulers import ExactDenoiserScheduler
from genkit.testing import tiny
from tests.pipelines.gaussians import GaussianNetwork

NAMES = ("sd15", "sdxl", "sd3", "flux")
KAPPAS = (20 ** (1 / 7) + torch.linspace(0, 1, 200, dtype=torch.float64) * (1e-3 ** (1 / 7) - 20 ** (1 / 7))) ** 7
SIGMAS = (KAPPAS / (1 + KAPPAS)).tolist()


def own(pipe, **overrides):
    new = FeynmanKacPipeline.from_pipe(pipe, **overrides)
    new.set_progress_bar_config(disable=True)
    return new


def gaussians(scheduler=None):
    net = GaussianNetwork(means=[1.0, 0.0], stds=[1.0, 1.5])
    pipe = FeynmanKacPipeline(scheduler=scheduler or FlowMatchEulerDiscreteScheduler(), transformer=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(name, **changes):
    return tiny.call_arguments(name, 3) | dict(output_type="latent", negative_prompt="two dogs") | changes


def test_guided_particles_follow_the_density_that_guidance_claims():
    out = gaussians()(
        class_labels=[0] * 3,
        num_particles=4000,
        guidance_scale=2.0,
        sigmas=SIGMAS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    x = out.images.view(3, 4000)
    assert out.weights.shape == (3, 4000) and out.log_z.shape == (3,) and out.network_calls == 400
    mean = (out.weights * x).sum(1)
    variance = (out.weights * (x - mean[:, None]) ** 2).sum(1)
    # Exact: 1.2857, 0.6429, log Z 0.4678; within the steps' bias and three standard errors.
    assert abs(mean.mean().item() - 1.2857) < 0.04
    assert abs(variance.mean().item() - 0.6429) < 0.07
    assert abs(out.log_z.mean().item() - 0.4678) < 0.02


def test_annealing_by_the_scheduler():
    scheduler = ExactDenoiserScheduler(noise_scale=1.0, exponent_sum=0.5)
    net = GaussianNetwork(means=[0.0], stds=[1.5])
    pipe = FeynmanKacPipeline(scheduler=scheduler, transformer=net)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    out = pipe(class_labels=[0] * 3, num_particles=4000, sigmas=SIGMAS, generator=generator, output_type="latent")
    variance = (out.weights * out.images.view(3, -1) ** 2).sum(1)
    assert abs(variance.mean().item() - 4.5) < 0.3 and abs(out.log_z.mean().item() + 1.297) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_without_anything_to_correct_it_is_plain_sampling(name, tiny_pipeline):
    pipe = own(tiny_pipeline(name))
    plain = TextToImagePipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    rng = lambda n: ItemRNG(0, range(n)).generators()  # noqa: E731
    one = pipe(**inputs(name, num_particles=1, guider=CFG(guidance_scale=3.0), generator=rng(1)))
    expected = plain(**inputs(name, guider=CFG(guidance_scale=3.0), generator=rng(1))).images
    assert torch.equal(one.images, expected) and one.weights.tolist() == [[1.0]] and one.chosen.tolist() == [0]
    four = pipe(**inputs(name, num_particles=4, generator=rng(4)))
    expected = plain(**inputs(name, num_images_per_prompt=4, generator=rng(4))).images
    assert torch.equal(four.images, expected) and (four.weights == 0.25).all()


def test_groups_do_not_see_each_other(tiny_pipeline):
    pipe = own(tiny_pipeline("sd15"))
    settings = dict(num_particles=3, guidance_scale=9.0, particles=None, num_inference_steps=5)
    pair = ItemRNG(0, [0, 1]).generators
    both = pipe(**inputs("sd15", prompt=["a cat", "blue"], generator=pair(), **settings))
    alone = pipe(**inputs("sd15", prompt="blue", generator=pair()[1:], **settings))
    torch.testing.assert_close(both.images[3:], alone.images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.weights[1:], alone.weights, rtol=1e-4, atol=1e-6)
    assert both.chosen[1] == alone.chosen[0] + 3 and both.weights.std() > 0
    torch.testing.assert_close(both.weights.sum(1), torch.ones(2, dtype=torch.float64))
    twice = pipe(**inputs("sd15", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **settings))
    assert twice.weights.shape == (2, 3) and len(twice.images) == 6


def test_steering_by_a_reward_and_output_types(tiny_pipeline):
    pipe = own(tiny_pipeline("sd3"))
    steering = FKSteering(8, reward=lambda x: x.mean((1, 2, 3)), reward_scale=30.0)
    free = pipe(**inputs("sd3", num_particles=8, generator=torch.Generator().manual_seed(0)))
    bright = pipe(
        **inputs("sd3", particles=steering, generator=torch.Generator().manual_seed(0), num_inference_steps=8)
    )
    assert (bright.weights * bright.images.mean((1, 2, 3))).sum() > free.images.mean((1, 2, 3)).mean()
    images, weights, log_z, chosen = pipe(**inputs("sd3", num_particles=2, output_type="pil"), return_dict=False)
    assert images[chosen[0]].size == (32, 32) and weights.shape == (1, 2) and log_z.shape == (1,)


def test_the_choice_is_drawn_by_weight():
    pipe = gaussians()
    settings = dict(class_labels=[0] * 400, num_particles=4, guidance_scale=4.0, num_inference_steps=12)
    out = pipe(**settings, output_type="latent", generator=torch.Generator().manual_seed(0))
    chosen = out.weights.flatten()[out.chosen].sum()
    expected, spread = out.weights.square().sum(), out.weights.square().sum(1).sqrt().sum() / 20
    assert abs(chosen - expected) < 4 * spread and (out.chosen // 4 == torch.arange(400)).all()


def test_saved_and_loaded_in_a_fresh_process(tiny_pipeline, tmp_path, fresh_process):
    expected = {}
    for name in NAMES:
        pipe = own(tiny_pipeline(name), guider=CFG(guidance_scale=3.0))
        assert isinstance(pipe.scheduler, ExactDenoiserScheduler) and pipe.scheduler.config.noise_scale == 1
        expected[name] = pipe(**inputs(name, num_particles=2))
        pipe.save_pretrained(tmp_path / name)
    got = fresh_process(
        "from genkit.pipelines import FeynmanKacPipeline\n"
        "from genkit.testing import tiny\n"
        "made = {}\n"
        f"for name in {NAMES!r}:\n"
        f"    pipe = FeynmanKacPipeline.from_pretrained({str(tmp_path)!r} + '/' + name)\n"
        "    told = tiny.call_arguments(name, 3) | dict(output_type='latent', negative_prompt='two dogs')\n"
        "    out = pipe(num_particles=2, **told)\n"
        "    made[name] = [v.tolist() for v in (out.images, out.weights, out.log_z, out.chosen)]\n"
        "print(json.dumps(made))"
    )
    for name, made in got.items():
        there = expected[name]
        torch.testing.assert_close(torch.tensor(made[0]), there.images, rtol=1e-5, atol=1e-5)
        for value, other in zip((there.weights, there.log_z), made[1:3], strict=True):  # sums over a thousand numbers
            torch.testing.assert_close(torch.tensor(other, dtype=value.dtype), value, rtol=1e-3, atol=1e-3)
        assert made[3] == there.chosen.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_particles=0), "num_particles=0"),
        (dict(num_particles=3, particles=FKC(2)), "num_particles=3, but particles=FKC was made for 2"),
        (dict(guider=APG()), "guider=APG follows no sum of scores"),
        (dict(guider=CFG(guidance_scale=2.0, stop=0.5)), "the density would jump"),
        (dict(generator=ItemRNG(0, range(3)).generators()), "3 entries for 8 images"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt=0"),
        (dict(negative_promt=""), "did you mean 'negative_prompt'"),
    ],
)
def test_bad_input_is_refused_before_the_first_call(settings, message, tiny_pipeline):
    pipe = own(tiny_pipeline("sd15"))
    pipe.network.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(**inputs("sd15") | settings)


def test_a_scheduler_of_ones_own(tiny_pipeline):
    pipe = own(tiny_pipeline("sd15"))
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    assert pipe(**inputs("sd15", num_particles=2, eta=1.0)).weights.shape == (1, 2)
