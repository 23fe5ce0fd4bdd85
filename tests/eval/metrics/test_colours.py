"""Saturation and contrast."""

import colorsys

import pytest
import torch

from genkit.eval.metrics.contrast import contrast
from genkit.eval.metrics.saturation import saturation
from genkit.eval.run import evaluate


def test_saturation_is_that_of_hsv():
    images = torch.rand(2, 3, 3, 4, dtype=torch.float64)
    images[0, :, 0, 0] = 0
    want = [[colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.flatten(1).T.tolist()] for image in images]
    torch.testing.assert_close(saturation(images), torch.tensor(want, dtype=torch.float64).mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(saturation(255 * images), saturation(images), rtol=1e-12, atol=0)


def test_extremes():
    red, grey = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.4)
    red[:, 0] = 0.7
    assert saturation(red).item() == 1 and saturation(grey).item() == 0
    assert contrast(grey).item() == pytest.approx(0, abs=1e-12)
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert contrast(board.expand(1, 1, 2, 2)).item() == 0.5
    assert contrast(board.expand(1, 3, 2, 2)).item() == pytest.approx(0.5, rel=1e-7)


def test_contrast_is_that_of_luma():
    images = torch.rand(3, 3, 5, 4, dtype=torch.float64)
    luma = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    torch.testing.assert_close(contrast(images), luma.flatten(1).std(1, correction=0), rtol=1e-12, atol=0)


def test_bad_images():
    with pytest.raises(ValueError, match=r"saturation of images \(2, 1, 4, 4\)"):
        saturation(torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"contrast of images \(2, 2, 4, 4\)"):
        contrast(torch.rand(2, 2, 4, 4))


def test_evaluate():
    images = torch.randint(0, 256, (9, 3, 6, 6), dtype=torch.uint8)
    values = evaluate(None, images, metrics=["saturation", "contrast"], extractor="none", quiet=True).values
    assert values["saturation"] == pytest.approx(float(saturation(images / 255).mean()), rel=1e-6)
    assert values["contrast"] == pytest.approx(float(contrast(images / 255).mean()), rel=1e-6)
