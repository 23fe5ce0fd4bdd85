"""The stroke thickness: bars whose width is known, what does not change it, and its slope."""

import pytest
import torch

from genkit import rewards
from genkit.data.digits import Digits

F64 = torch.float64


def bars(*widths):
    images = torch.zeros(len(widths), 1, 256, 256, dtype=F64)
    for image, width in zip(images, widths, strict=True):
        image[:, 20 : 20 + width, 8:248] = 1
    return images


def test_of_a_bar_it_is_the_width():
    thickness = rewards.make("thickness")
    got = thickness(bars(1, 2, 5))
    torch.testing.assert_close(got, torch.tensor([1.0, 2.0, 5.0], dtype=F64), rtol=0.03, atol=0)
    torch.testing.assert_close(thickness(bars(1, 2, 5).mT), got, rtol=1e-9, atol=0)
    edge = bars(3).roll(-20, 2)  # the outline along the margin counts, too
    torch.testing.assert_close(thickness(edge), thickness(bars(3)), rtol=1e-9, atol=0)


def test_brightness_and_colour_do_not_change_it():
    thickness, images = rewards.make("thickness"), (Digits().images[:8].double() + 1) / 2
    torch.testing.assert_close(thickness(0.3 * images), thickness(images), rtol=1e-9, atol=0)
    torch.testing.assert_close(thickness(images.expand(-1, 3, -1, -1)), thickness(images), rtol=1e-12, atol=0)
    assert thickness.takes is None


def test_its_slope_is_finite_everywhere_and_that_of_differences():
    thickness = rewards.make("thickness")
    images = torch.cat(((Digits().images[:4].double() + 1) / 2 * 0.9 + 0.05, torch.zeros(1, 1, 8, 8, dtype=F64)))
    images.requires_grad_()
    values = thickness(images)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert values[-1] == 0 and gradient.isfinite().all()
    way = torch.randn(images.shape, dtype=F64, generator=torch.Generator().manual_seed(0))[:4]
    # Flat places have a kink: differences are taken where there is none.
    rough = images[:4].detach() + 0.1 * torch.rand(way.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(thickness(rough.requires_grad_()).sum(), rough)
    with torch.no_grad():
        difference = (thickness(rough + 1e-6 * way) - thickness(rough - 1e-6 * way)).sum() / 2e-6
    assert (gradient * way).sum().item() == pytest.approx(difference.item(), rel=1e-5)


def test_settings_are_refused():
    with pytest.raises(ValueError, match="width"):
        rewards.make("thickness", width=2)
