"""What holds for all rewards."""

import re

import pytest
import torch

from genkit import rewards
from genkit.registry import lookup
from genkit.rewards._loading import NetworkConfig
from genkit.rewards.base import Reward
from tests.rewards import ready, tiny

NAMES = rewards.names()
CLASSES = {name: lookup("genkit.rewards", Reward, name, setting="reward") for name in NAMES}
DIFFERENTIABLE = [name for name in NAMES if CLASSES[name].differentiable]
NETWORKS = [name for name in NAMES if issubclass(CLASSES[name].Config, NetworkConfig)]
ASKING = [name for name in NAMES if CLASSES[name].takes == "prompts"]
TEXTS = ["a red cat", "two dogs on grass", "hen", "four eggs"]


def asked(made, count=3):
    return {None: None, "prompts": TEXTS[:count], "labels": torch.arange(count)}[made.takes]


def pictures(name):
    return ready.IMAGES.get(name, ready.various(3, 40, 56))


@pytest.mark.parametrize("name", NAMES)
def test_a_number_for_each_image_by_itself(name, reward):
    made, images = reward(name), pictures(name)
    n = len(images)
    prompts = asked(made, n)
    scores = made(images, prompts)
    assert scores.shape == (n,) and scores.dtype == torch.float32 and scores.isfinite().all()
    assert n > 1 and len(set(scores.tolist())) == n, "give tests/rewards/ready.py, IMAGES, such as differ"

    def some(rows):
        return made(images[rows], {None: None, "prompts": [TEXTS[i] for i in rows]}.get(made.takes, torch.tensor(rows)))

    order = [*range(1, n), 0]
    torch.testing.assert_close(some(order), scores[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([some([i]) for i in range(n)]), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_frozen_and_one_mode_serves_training_and_evaluation(name, reward):
    made, images = reward(name), pictures(name)
    prompts = asked(made, len(images))
    assert not any(p.requires_grad for p in made.parameters())
    before = made(images, prompts)
    torch.nn.ModuleList([made]).train()
    assert not any(module.training for module in made.modules())
    assert torch.equal(made(images, prompts), before)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_derivative_is_that_of_finite_differences(name, reward):
    made, images = reward(name).double(), pictures(name).double()
    # With some noise, since a derivative need not exist where neighbours are equal or a pixel is black or white.
    images = (0.1 + 0.3 * images + 0.5 * tiny.images(*images.shape, seed=1).double()).requires_grad_()
    prompts = asked(made, len(images))
    scores = made(images, prompts)
    assert scores.dtype == torch.float64
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    way, h = torch.randn_like(images), 1e-6
    with torch.no_grad():
        ends = [made(images + s * h * way, prompts) for s in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * h), (gradient * way).sum((1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_smooth_image_of_twice_the_size_scores_nearly_the_same(name, reward):
    made = reward(name)
    x = torch.linspace(0, 1, 64)
    waves = torch.stack([torch.sin(5 * x)[:, None] * torch.cos(4 * x + c) for c in range(3)])[None] / 2 + 0.5
    large = torch.nn.functional.interpolate(waves, scale_factor=2, mode="bilinear", align_corners=False)
    prompts = asked(made, 1)
    spread = made(tiny.images(3, 3, 64, 64), asked(made)).std()
    assert abs(made(waves, prompts) - made(large, prompts)) < 0.1 * spread + 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_rounding_as_eight_bits_changes_the_score_little_and_lets_the_gradient_pass(name, reward):
    images = tiny.images(3, 3, 40, 56).requires_grad_()
    plain, eight_bits = (reward(name, quantise=q) for q in (False, True))
    scores = [made(images, asked(made)) for made in (plain, eight_bits)]
    gradients = [torch.autograd.grad(s.sum(), images)[0].flatten() for s in scores]
    assert not torch.equal(*scores)
    assert (scores[0] - scores[1]).abs().max() < 0.1 * scores[0].std()
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95  # the networks are steep ones


@pytest.mark.parametrize("name", NETWORKS)
def test_antialiasing_is_a_setting(name, reward):
    images = tiny.images(3, 3, 100, 120)
    with_it, without = (reward(name, antialias=a) for a in (True, False))
    assert with_it.config.antialias and not without.config.antialias
    assert not torch.allclose(with_it(images, asked(with_it)), without(images, asked(without)), rtol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_in_less_precision(name, reward):
    images = tiny.images(3, 3, 40, 56).requires_grad_()
    full, half = reward(name), reward(name, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    scores = half(images, asked(half))
    assert scores.dtype == torch.float32
    spread = full(images, asked(full)).std()
    assert (scores - full(images, asked(full))).abs().max() < 0.3 * spread + 0.05
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("name", NETWORKS)
def test_autocast_does_not_reach_inside(name, reward):
    made, images = reward(name), tiny.images(3, 3, 40, 56)
    with torch.autocast("cpu", torch.bfloat16):
        inside = made(images, asked(made))
    assert torch.equal(inside, made(images, asked(made)))


@pytest.mark.parametrize("name", NETWORKS)
def test_making_one_does_not_move_the_random_state(name, reward):
    state = torch.get_rng_state()
    reward(name)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_are_scored_or_refused_before_work(name, reward):
    made, grey = reward(name), tiny.images(3, 1, 40, 56)
    try:
        made.check_size((1, 40, 56))
    except ValueError:
        return
    scores = made(grey, asked(made))
    assert scores.shape == (3,) and scores.isfinite().all()
    if name in NETWORKS:
        torch.testing.assert_close(scores, made(grey.expand(-1, 3, -1, -1), asked(made)))


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_that_is_told_is_from_low_to_high(name, reward):
    scale = reward(name).scale
    assert scale is None or len(scale) == 2 and scale[0] < scale[1]


@pytest.mark.parametrize("name", NAMES)
def test_unknown_settings_are_refused(name, settings):
    with pytest.raises(ValueError, match="colour"):
        rewards.make(name, **settings.get(name, {}), colour="red")


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_is_not_imported(name):
    source = __import__("inspect").getsource(__import__("sys").modules[CLASSES[name].__module__])
    assert not re.search(r"^\s*(import|from) torchvision", source, re.MULTILINE)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="did you mean 'hpsv2'"):
        rewards.make("hpsv2.1")


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts=NoneType"),
        ("a cat", "prompts=str"),
        (torch.arange(3), "prompts=Tensor"),
        (["a cat"], "1 prompts for 3 images"),
    ],
)
def test_prompts_of_another_form_or_number_are_refused(name, prompts, message, reward):
    with pytest.raises(ValueError, match=message):
        reward(name)(tiny.images(3, 3, 40, 40), prompts)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
    ids=["no batch", "four channels", "integers"],
)
def test_images_of_another_form_are_refused(images, reward):
    with pytest.raises(ValueError, match="accepted are floats"):
        reward("jpeg")(images)


def test_half_precision_images_are_prepared_in_float32(reward):
    made, images = reward("clip_score"), tiny.images(3, 3, 40, 56).bfloat16()
    assert torch.equal(made(images, TEXTS[:3]), made(images.float(), TEXTS[:3]))


def test_a_gradient_that_does_not_exist_is_refused(reward):
    made, images = reward("jpeg"), tiny.images(2, 3, 16, 16).requires_grad_()
    with pytest.raises(ValueError, match="JPEG is not differentiable"):
        made(images)
    with torch.no_grad():
        assert made(images).shape == (2,)
