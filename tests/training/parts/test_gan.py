"""Losses of generator and discriminator, and what pictures go through before they are judged."""

import math

import pytest
import torch
from torch import nn

from genkit.rng import ItemRNG
from genkit.training.parts.differentiable_augmentation import augment
from genkit.training.parts.gan import LastLayer, LeCam, adaptive_weight, discriminator_loss, generator_loss

F64 = torch.float64


def test_losses_by_hand():
    real, fake = torch.tensor([[2.0, 0.5]], dtype=F64), torch.tensor([[-3.0, 0.0]], dtype=F64)
    assert generator_loss(fake, "hinge").item() == 1.5
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx((0.25 + 0.5) / 2)
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert generator_loss(fake, "non_saturating").item() == pytest.approx((softplus(3) + softplus(0)) / 2)
    expected = (softplus(-2) + softplus(-0.5)) / 4 + (softplus(-3) + softplus(0)) / 4
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(expected)


def test_the_adaptive_weight_is_a_ratio_of_norms():
    a, b = torch.tensor([3.0, 4.0], dtype=F64), torch.tensor([[0.6], [0.8]], dtype=F64)
    assert adaptive_weight(a, b).item() == pytest.approx(5 / (1 + 1e-4), rel=1e-12)
    assert adaptive_weight(a, 0 * b).item() == 1e4  # at most
    assert adaptive_weight(0 * a, b).item() == 0


@pytest.mark.parametrize("padding", [0, 1])
def test_the_gradient_of_the_last_layer_is_autograds(padding):
    torch.manual_seed(0)
    layer, h = nn.Conv2d(3, 2, 3, padding=padding).double(), torch.randn(2, 3, 5, 6, dtype=F64)
    out = layer(h)
    loss = (out**3).mean()
    (expected,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    torch.testing.assert_close(LastLayer(layer, h, out).gradient(loss), expected)
    loss.backward()  # the graph is kept


def test_lecam_by_hand():
    lecam = LeCam(0.5).double()
    real, fake = torch.tensor([1.0, 3.0], dtype=F64), torch.tensor([-1.0, 0.0], dtype=F64)
    # Averages start as the first batch's: 2 and -0.5.
    first = ((1.5**2 + 3.5**2) + (3**2 + 2**2)) / 2
    assert lecam(real, fake).item() == pytest.approx(first)
    assert lecam.means.tolist() == [2.0, -0.5]
    # max(0, -2 + 0.5), and max(0, 2 - 3).
    assert lecam(torch.tensor([-2.0], dtype=F64), torch.tensor([3.0], dtype=F64)).item() == 0
    assert lecam.means.tolist() == [0.0, 1.25]


@pytest.mark.parametrize("kind", ["color", "translation", "cutout"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_is_each_pictures_own_and_has_a_gradient(kind, channels):
    x = torch.rand(4, channels, 5, 4, dtype=F64) + 0.5
    whole = augment(x, ItemRNG(3, range(4)), [kind])
    part = augment(x[2:], ItemRNG(3, [2, 3]), [kind])
    assert torch.equal(whole[2:], part) and whole.shape == x.shape
    assert not torch.equal(whole, x)
    assert not torch.equal(whole, augment(x, ItemRNG(4, range(4)), [kind]))
    assert torch.autograd.gradcheck(lambda p: augment(p, ItemRNG(3, range(4)), [kind]), x.requires_grad_())


def test_augmentations():
    x = torch.rand(200, 1, 8, 8) + 0.5
    rng = lambda: ItemRNG(0, range(200))  # noqa: E731
    assert torch.equal(augment(x, rng(), []), x)
    moved = augment(x, rng(), ["translation"])
    for one, other in zip(x[:20, 0], moved[:20, 0], strict=True):
        padded = torch.nn.functional.pad(one, (1, 1, 1, 1))
        assert any(torch.equal(padded[r : r + 8, c : c + 8], other) for r in range(3) for c in range(3))
    cut = (augment(x, rng(), ["cutout"]) == 0).float().mean((1, 2, 3))
    assert cut.max() == 16 / 64 and 0.1 < cut.mean() < 0.25
    shift = (augment(x, rng(), ["color"]) - x).mean((1, 2, 3))
    assert shift.min() > -0.5 and shift.max() < 0.5 and shift.std() > 0.2
