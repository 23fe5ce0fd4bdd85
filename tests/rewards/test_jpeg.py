"""File sizes as rewards."""

import io

import numpy
import pytest
import torch
from PIL import Image

from genkit import rewards
from tests.rewards import tiny


@pytest.mark.parametrize("quality", [95, 30])
def test_minus_the_kilobytes_that_pil_writes(quality):
    images = tiny.images(2, 3, 32, 48)
    expected = []
    for image in images:
        file = io.BytesIO()
        array = numpy.rint(image.numpy() * 255).astype(numpy.uint8).transpose(1, 2, 0)
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        expected.append(-file.tell() / 1000)
    assert torch.equal(rewards.make("jpeg", quality=quality)(images), torch.tensor(expected))


def test_flat_images_are_small_and_noise_is_large():
    flat, noise = rewards.make("jpeg")(torch.stack([torch.full((3, 64, 64), 0.5), tiny.images(3, 64, 64)]))
    assert flat > noise + 1


def test_grey_images_have_two_channels_less_to_store():
    grey, colour = (rewards.make("jpeg")(tiny.images(3, c, 40, 56)) for c in (1, 3))
    assert (grey > colour).all()


def test_a_quality_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="quality"):
        rewards.make("jpeg", quality=101)
