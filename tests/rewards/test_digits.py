"""The reward on digits: what it is of, who taught it what, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from genkit import rewards
from genkit.data.digits import Digits
from genkit.rewards.digits import ASSETS

NETWORKS = ("trained", "held_out")


@pytest.fixture(scope="module")
def digits():
    data = Digits()
    return (data.images + 1) / 2, data.labels


@pytest.mark.parametrize("name", NETWORKS)
def test_it_knows_digits(name, digits):
    images, labels = digits
    reward = rewards.make("digits", network=name)
    got = reward(images, labels)
    assert got.dtype == torch.float32 and (got <= 0).all() and got.exp().mean() > 0.95
    record = json.loads((ASSETS / f"digits_{name}.json").read_text())
    accuracy = sum(rewards.make("digits", network=name, wanted=k)(images).exp() for k in range(10))
    torch.testing.assert_close(accuracy, torch.ones(len(images)))
    right = (reward.model(2 * images - 1).argmax(1) == labels).double().mean().item()
    halves = [record["training"][f"{which}_accuracy"] for which in ("train", "test")]
    assert right == pytest.approx(sum(halves) / 2, abs=1e-3) and min(halves) > 0.97


def test_a_wanted_class_and_the_class_asked_for_are_the_same_number(digits):
    images, labels = digits
    threes = labels == 3
    torch.testing.assert_close(
        rewards.make("digits", wanted=3)(images[threes]), rewards.make("digits")(images[threes], labels[threes])
    )
    assert rewards.make("digits", wanted=3).takes is None and rewards.make("digits").takes == "labels"


def test_the_networks_are_three(digits):
    """Reward, held-out reward and evaluation are different functions of an image, and small files."""
    from genkit.eval.extractors.digits import DigitsExtractor

    images, _ = digits
    noise = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    said = [rewards.make("digits", network=name).model(2 * noise - 1).softmax(1) for name in NETWORKS]
    said.append(DigitsExtractor().network(2 * noise - 1).softmax(1))
    for i in range(3):
        assert (said[i] - said[i - 1]).abs().max() > 0.5
    for name in NETWORKS:
        path = ASSETS / f"digits_{name}.safetensors"
        assert path.stat().st_size < 100_000 and all(v.isfinite().all() for v in load_file(path).values())
    splits = {json.loads((ASSETS / f"digits_{name}.json").read_text())["training"]["split"] for name in NETWORKS}
    assert len(splits) == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_is_that_of_the_number(name, digits):
    reward = rewards.make("digits", network=name, wanted=3).double()
    images = digits[0][:4].double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images).sum(), images)
    assert not any(p.requires_grad for p in reward.parameters())
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (reward(images + 1e-6 * direction) - reward(images - 1e-6 * direction)).sum() / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)


def test_making_one_draws_nothing_from_the_random_stream():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rewards.make("digits", network="held_out", wanted=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("settings", [dict(wanted=10), dict(wanted=-1), dict(network="other"), dict(label=3)])
def test_other_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        rewards.make("digits", **settings)


def test_other_pictures_and_labels_are_refused():
    reward = rewards.make("digits")
    with pytest.raises(ValueError, match=r"\(3, 8, 8\); accepted are those of digits, \(1, 8, 8\)"):
        reward.check_size((3, 8, 8))
    with pytest.raises(ValueError, match=r"\(1, 16, 16\)"):
        rewards.make("digits", wanted=1)(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match=r"labels \[3, 12\]; accepted are 0 to 9"):
        reward(torch.zeros(2, 1, 8, 8), torch.tensor([3, 12]))
    with pytest.raises(ValueError, match="accepted is class labels"):
        reward(torch.zeros(2, 1, 8, 8))
