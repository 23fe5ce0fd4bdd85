"""Pairs of pictures and their degraded versions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from genkit.data import batches, make
from genkit.data.degradation import RealESRGAN, Resize, Stage, jpeg
from genkit.rng import ItemRNG

SYNTHETIC = dict(name="synthetic", shape=(3, 32, 32))
# What leaves a picture as it is, but for JPEG at its best.
NEUTRAL = dict(
    blur_probability=0.0,
    resize_probability=(0.0, 0.0),
    gaussian_probability=1.0,
    noise_sigma=(1e-6, 1e-6),
    jpeg_quality=(100, 100),
)


def generator(i=0):
    return ItemRNG(0, [i]).generators()[0]


def smooth(side=32):
    """A picture that survives compression: a few waves, different in each channel."""
    axis = torch.linspace(0, 3, side)
    return torch.stack([0.5 + 0.3 * torch.sin(axis[:, None] + k) * torch.cos(axis * (k + 1) / 2) for k in range(3)])


@pytest.mark.parametrize("degradation", [dict(kind="real_esrgan"), dict(kind="resize", filter="bicubic")])
def test_an_item_depends_on_its_number_alone(degradation):
    source = make("super_resolution", source=SYNTHETIC, degradation=degradation)
    whole = source.__getitems__(range(8))
    assert whole["low"].shape == (8, 3, 8, 8) and whole["low"].abs().max() <= 1
    for items in ([5], [7, 2], [3, 4, 5, 6]):
        part = source.__getitems__(items)
        assert torch.equal(part["low"], whole["low"][items]) and torch.equal(part["x0"], whole["x0"][items])


def test_batches_and_workers_do_not_change_a_pair():
    source = make("super_resolution", source=dict(name="digits"), scale=2, seed=3)

    def stream(size, **how):
        found = {}
        for batch in batches(source, size, **how):
            found |= dict(zip(batch["index"].tolist(), batch["low"], strict=True))
            if len(found) >= 12:
                return torch.stack([found[i] for i in range(12)])

    assert torch.equal(stream(12), stream(4)) and torch.equal(stream(12), stream(6, num_workers=1))


def test_every_visit_draws_another():
    source = make("super_resolution", source=dict(name="digits"), scale=2)
    first, again = (source.__getitems__([i]) for i in (5, 5 + len(source)))
    assert torch.equal(first["x0"], again["x0"]) and not torch.equal(first["low"], again["low"])
    other = make("super_resolution", source=dict(name="digits"), scale=2, seed=1).__getitems__([5])
    assert not torch.equal(first["low"], other["low"])
    assert torch.equal(first["class_labels"], other["class_labels"])


def test_cuts_are_cut_from_the_picture():
    source = make("super_resolution", source=SYNTHETIC, crop_size=16, scale=4)
    assert source.shape == (3, 16, 16)
    read, whole = source.__getitems__(range(6)), make(**SYNTHETIC).__getitems__(range(6))["x0"]
    places = set()
    for cut, picture in zip(read["x0"], whole, strict=True):
        windows = picture.unfold(1, 16, 1).unfold(2, 16, 1)
        here = [(i, j) for i in range(17) for j in range(17) if torch.equal(windows[:, i, j], cut)]
        assert len(here) == 1
        places |= set(here)
    assert len(places) > 1


def test_plain_resizing_is_interpolation():
    x = torch.rand(3, 16, 24)
    mean = x.view(3, 4, 4, 6, 4).mean((2, 4))
    torch.testing.assert_close(Resize(filter="area")(x, 4, generator()), mean)
    expected = F.interpolate(x[None], size=(4, 6), mode="bicubic", antialias=True)[0].clamp(0, 1)
    torch.testing.assert_close(Resize()(x, 4, generator()), expected)


def test_jpeg_is_pillows():
    x = torch.rand(3, 16, 16)
    file = io.BytesIO()
    Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=40)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    assert torch.equal(jpeg(x, 40), expected)
    assert jpeg(x[:1], 40).shape == (1, 16, 16)
    errors = [(jpeg(smooth(), q) - smooth()).abs().mean().item() for q in (10, 50, 95)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


def test_without_any_of_its_parts_it_only_resizes():
    neutral = RealESRGAN(first=Stage(**NEUTRAL), second=Stage(**NEUTRAL), final_sinc_probability=0.0)
    grey = smooth()[:1]
    for i in range(4):  # by whichever filter is drawn
        assert (neutral(grey, 4, generator(i)) - Resize()(grey, 4, generator())).abs().max() < 0.04


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        (dict(blur_probability=1.0, sinc_probability=0.0, blur_sigma=(3.0, 3.0)), 0.02),
        (dict(blur_probability=1.0, sinc_probability=1.0), 0.001),
        (dict(resize_probability=(0.0, 1.0), resize_range=(0.2, 0.3)), 0.02),
        (dict(noise_sigma=(25.0, 25.0)), 0.02),
        (dict(gaussian_probability=0.0, poisson_scale=(3.0, 3.0)), 0.02),
        (dict(jpeg_quality=(5, 5)), 0.01),
    ],
)
def test_each_part_does_something(changes, bound):
    x = torch.rand(3, 32, 32) * 0.5 + 0.25
    plain, spoiled = (
        RealESRGAN(first=Stage(**NEUTRAL | c), second=Stage(**NEUTRAL), final_sinc_probability=0.0)
        for c in ({}, changes)
    )
    difference = [(spoiled(x, 2, generator(i)) - plain(x, 2, generator(i))).abs().mean().item() for i in range(6)]
    assert sum(difference) / 6 > bound


def test_noise_has_the_level_and_colour_asked_for():
    flat, colours = torch.full((3, 64, 64), 0.5), []
    for grey in (0.0, 1.0):
        first = Stage(**NEUTRAL | dict(noise_sigma=(25.0, 25.0), grey_probability=grey))
        spoil = RealESRGAN(first=first, second=Stage(**NEUTRAL), final_sinc_probability=0.0)
        noise = spoil(flat, 1, generator()) - 0.5
        colours.append((noise - noise.mean(0, keepdim=True)).std().item())
        brightness = noise.mean(0).std().item()
        # JPEG keeps the luma, 0.299, 0.587 and 0.114 of the channels, and little of coloured noise.
        assert brightness == pytest.approx(25 / 255 * (1 if grey else 0.669), rel=0.1)
    assert colours[0] > 5 * colours[1]


def test_blur_of_a_bell_has_its_width():
    """A point becomes a bell of the drawn standard deviation."""
    from genkit.data import degradation

    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    draw = degradation._Draw(generator())
    kernels = [degradation._bell(21, (2.0, 2.0), draw) for _ in range(40)]
    widths = []
    for kernel in kernels:
        spread = degradation._blur(point, kernel)[0]
        assert spread.sum().item() == pytest.approx(1, abs=1e-5)
        axis = torch.arange(41.0) - 20
        widths.append((spread.sum(0) * axis.square()).sum().sqrt().item())
    assert sum(abs(w - 2) < 0.01 for w in widths) >= 20  # the plain Gaussians, 70 of 100
    sinc = degradation._sinc(21, draw)
    assert sinc.min() < 0 < sinc[10, 10] == sinc.max()  # it rings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(source=dict(name="digit")), "source.name='digit' is not known; did you mean 'digits'"),
        (dict(source=dict(size=8)), "name is missing"),
        (dict(source=dict(name="super_resolution")), "cannot be paired again"),
        (dict(source=dict(name="synthetic", shpe=[3, 8, 8])), "shpe"),
        (dict(source=dict(name="eight_gaussians")), r"gives samples of shape \(2,\)"),
        (dict(source=dict(name="digits"), scale=3), "scale=3 does not divide the pictures of 8 x 8"),
        (dict(source=dict(name="image_folder", path="x", size=30)), "source.size=30 is not a multiple of scale=4"),
        (dict(source=SYNTHETIC, crop_size=30), "crop_size=30 is not a multiple of scale=4"),
        (dict(source=SYNTHETIC, crop_size=64), "crop_size=64: source='synthetic' gives pictures of 32 x 32"),
        (dict(source=SYNTHETIC, degradation=dict(kind="blur")), "real_esrgan"),
        (dict(source=SYNTHETIC, degradation=dict(first=dict(kernel_sizes=[8]))), "kind"),
        (dict(source=SYNTHETIC, degradation=dict(kind="real_esrgan", first=dict(kernel_sizes=[8]))), "odd numbers"),
        (dict(source=SYNTHETIC, degradation=dict(kind="real_esrgan", first=dict(blur_sigma=[2, 1]))), "low <= high"),
        (dict(source=SYNTHETIC, degradation=dict(kind="real_esrgan", first=dict(jpeg_quality=[5, 101]))), "1 to 100"),
        (
            dict(source=SYNTHETIC, degradation=dict(kind="real_esrgan", second=dict(resize_probability=[0.7, 0.7]))),
            "sum is at most 1",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make("super_resolution", **settings)
