"""Latents and pictures that are optimised by score distillation."""

import pytest
import torch

from genkit.denoisers import from_pipeline
from genkit.denoisers.base import Condition
from genkit.testing.oracles import GaussianMixture
from genkit.training.optimize_image import optimize_image
from genkit.training.parts.annealing import Constant, LinearSchedule
from genkit.training.parts.fake import FullFake, LoraFake

# Two classes at +2 and -2; class 2 stands for none.
TWO = GaussianMixture([[2.0], [-2.0]], 0.3, labels=[0, 1])


def condition(labels):
    return Condition({"class_labels": torch.tensor(labels)}, {"class_labels": torch.full((len(labels),), 2)})


def optimised(**settings):
    denoiser = TWO.denoiser("flow_prediction")
    denoiser.network = Fixed(denoiser.network)
    settings = dict(guidance_scale=1.0, num_steps=120, learning_rate=0.1, views=4, quiet=True) | settings
    return optimize_image(denoiser, torch.zeros(4, 1), condition([0, 1, 1, 0]), **settings)


class Fixed(torch.nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, t, **condition):
        return self.fn(x, t, **condition)


@pytest.mark.parametrize(
    "settings", [dict(), dict(method="csd"), dict(guidance_scale=3.0), dict(weight="dmd"), dict(guidance_scale=None)]
)
def test_every_item_finds_what_it_is_asked_for(settings):
    x = optimised(**settings)
    assert (x.sign()[:, 0] == torch.tensor([1, -1, -1, 1])).all()
    if not settings:
        assert x.abs() == pytest.approx(torch.full((4, 1), 2.0), abs=0.3)


def test_an_item_does_not_depend_on_how_many_there_are():
    denoiser = TWO.denoiser("flow_prediction")
    denoiser.network = Fixed(denoiser.network)
    settings = dict(guidance_scale=1.0, num_steps=5, quiet=True)
    both = optimize_image(denoiser, torch.zeros(2, 1), condition([0, 1]), **settings)
    alone = optimize_image(denoiser, torch.zeros(1, 1), condition([0]), **settings)
    torch.testing.assert_close(alone[0], both[0])


def test_the_negative_prompt_of_nfsd_pushes_away():
    x = optimised(method="nfsd", negative=condition([1, 0, 0, 1]), times=Constant(low=0.3))
    assert (x.sign()[:, 0] == torch.tensor([1, -1, -1, 1])).all()


def weights_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if "lora" not in name}


@pytest.mark.parametrize("fake", [None, LoraFake(rank=2, repeats=2), FullFake(repeats=1, optimizer=dict(lr=1e-3))])
def test_vsd_leaves_the_teacher_as_it_was(fake, tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    denoiser = from_pipeline(pipe)
    prompts = denoiser.encode(pipe, prompt=["a cat"], negative_prompt="")
    start, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    before = denoiser(start, t, prompts).raw.detach()
    for _ in range(2):  # the adapter's name is free again
        made = optimize_image(denoiser, start, prompts, method="vsd", fake=fake, num_steps=3, quiet=True)
        assert made.isfinite().all() and (made - start).abs().max() > 1e-3
        assert torch.equal(denoiser(start, t, prompts).raw, before)


def test_pictures_are_regressed_on_decoded_targets(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    denoiser = from_pipeline(pipe)
    prompts = denoiser.encode(pipe, prompt=["a cat"], negative_prompt="")
    start, targets, seen = torch.zeros(1, 3, 32, 32), [], []
    pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: targets.append(output.clamp(-1, 1)))
    made = optimize_image(
        denoiser,
        start,
        prompts,
        vae=pipe.vae,
        num_steps=1,
        times=LinearSchedule(high=0.6),
        quiet=True,
        callback=lambda step, x: seen.append((step, x.clone())),
    )
    (target,) = targets
    # Adam's first step is of the size of its rate in every element, towards the target.
    torch.testing.assert_close(made, 1e-2 * target.sign(), rtol=1e-3, atol=1e-6)
    assert seen[0][0] == 0 and torch.equal(seen[0][1], made)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(num_steps=0), "num_steps=0: must be at least 1"),
        (dict(views=0), "views=0: must be at least 1"),
        (dict(negative=Condition()), "method='sds' with a negative condition"),
        (dict(method="nfsd"), "with no negative condition: 'nfsd' needs one"),
        (dict(fake=FullFake()), "method='sds' has no fake model; fake goes with vsd and dmd"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        optimised(**settings)


def test_conditions_that_do_not_fit():
    denoiser = TWO.denoiser("flow_prediction")
    with pytest.raises(ValueError, match="condition has 2 items, x has 3"):
        optimize_image(denoiser, torch.zeros(3, 1), condition([0, 1]))
    with pytest.raises(ValueError, match="guidance_scale=7.5: method='sds' has no condition to guide by"):
        optimize_image(denoiser, torch.zeros(3, 1), Condition(), guidance_scale=7.5)
    with pytest.raises(ValueError, match="guidance_scale=2: method='csd' is the guidance alone"):
        optimize_image(denoiser, torch.zeros(2, 1), condition([0, 1]), method="csd", guidance_scale=2.0)
