"""The differentiable preprocessing against PIL and transformers, and its gradients."""

import json

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from genkit.networks.image_classifiers import CLIP_MEAN, CLIP_STD
from genkit.rewards._preprocessing import Preprocessing, fitted, padded, rounded

SIZES = [(180, 300), (224, 224), (256, 256), (333, 250), (512, 512), (225, 517), (190, 190), (720, 1024)]
STD = torch.tensor(CLIP_STD).view(3, 1, 1)
MEAN = torch.tensor(CLIP_MEAN).view(3, 1, 1)


def picture(kind: str, height: int, width: int) -> numpy.ndarray:
    """Eight-bit ``(H, W, 3)``: noise, hard edges, or something smooth."""
    random = numpy.random.default_rng(height)
    y, x = numpy.mgrid[:height, :width]
    if kind == "noise":
        return random.integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    if kind == "edges":
        checks = ((x // 7 + y // 5) % 2 * 255)[..., None] * numpy.ones(3)
        checks[: height // 2, :, 1] = (x // 3 % 2 * 255)[: height // 2]
        return checks.astype(numpy.uint8)
    waves = numpy.stack([numpy.sin(x / 40 + c) + numpy.cos(y / 30 - c) for c in range(3)], -1)
    return ((waves / 4 + 0.5) * 255).astype(numpy.uint8)


PICTURES = [picture(kind, *size) for size in SIZES for kind in ("noise", "edges", "smooth")]


def by_pil(array: numpy.ndarray, side: int = 224) -> torch.Tensor:
    """CLIP's own preprocessing, written out."""
    height, width = array.shape[:2]
    short, long = min(height, width), max(height, width)
    other = int(side * long / short)
    size = (side, other) if width <= height else (other, side)
    resized = Image.fromarray(array).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    cropped = numpy.asarray(resized)[top : top + side, left : left + side]
    return (torch.from_numpy(cropped / 255).permute(2, 0, 1).float() - MEAN) / STD


def floats(array: numpy.ndarray, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].to(dtype) / 255


def steps_off(pixels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Differences of normalised pixels in steps of eight bits."""
    return ((pixels - reference) * STD * 255).abs()


@pytest.mark.parametrize(("quantise", "most", "mean"), [(True, 2.0 + 1e-3, 0.1), (False, 1.5, 0.33)])
def test_equal_to_pil_within_the_rounding(quantise, most, mean):
    preprocess = Preprocessing(224, (224, 224), quantise=quantise)
    off = [steps_off(preprocess(floats(array))[0], by_pil(array)) for array in PICTURES]
    assert max(o.max() for o in off) <= most
    assert sum(o.mean() for o in off) / len(off) <= mean


def test_equal_to_the_processor_of_transformers():
    """Its PIL class: the one that needs no torchvision."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers 4
        from transformers import CLIPImageProcessor as Processor
    processor, preprocess = Processor(), Preprocessing(224, (224, 224), quantise=True)
    for array in PICTURES[::4]:
        reference = processor(Image.fromarray(array), return_tensors="pt").pixel_values[0]
        assert torch.equal(by_pil(array), reference.float()) or steps_off(by_pil(array), reference).max() < 1e-3
        assert steps_off(preprocess(floats(array))[0], reference).max() <= 2 + 1e-3


def test_what_the_two_passes_the_clamp_and_the_antialiasing_are_for():
    """Without them pixels are off by many times what is allowed above."""
    array = picture("edges", 333, 250)
    one_pass = F.interpolate(floats(array), (298, 224), mode="bicubic", antialias=True)
    one_pass = ((one_pass.clamp(0, 1)[..., 37:261, :] - MEAN) / STD)[0]
    assert steps_off(one_pass, by_pil(array)).max() > 10
    array = picture("noise", 512, 512)
    aliased = Preprocessing(224, (224, 224), antialias=False)(floats(array))[0]
    assert steps_off(aliased, by_pil(array)).max() > 50


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_a_fixed_size_is_reached_as_pil_does(mode):
    preprocess = Preprocessing((40, 24), None, (0, 0, 0), (1, 1, 1), mode, quantise=True)
    for array in PICTURES[:6]:
        resized = Image.fromarray(array).resize((24, 40), getattr(Image.Resampling, mode.upper()))
        off = (preprocess(floats(array)) - floats(numpy.asarray(resized))) * 255
        assert off.abs().max() <= 2 + 1e-3


def test_half_a_pixel_of_margin_goes_where_it_is_said():
    rows = torch.linspace(0, 1, 7).view(1, 1, 7, 1).expand(1, 3, 7, 4)  # 7 rows to 4: margin 1.5 on each side
    crop = dict(size=4, crop=(4, 4), mean=(0,) * 3, std=(1,) * 3)
    torch.testing.assert_close(Preprocessing(**crop)(rows)[0, 0, :, 0], torch.arange(1.0, 5) / 6)
    torch.testing.assert_close(Preprocessing(**crop, half=round)(rows)[0, 0, :, 0], torch.arange(2.0, 6) / 6)


def test_grey_images_are_seen_in_three_channels():
    grey = torch.rand(2, 1, 20, 20)
    preprocess = Preprocessing(16, (16, 16))
    assert torch.equal(preprocess(grey), preprocess(grey.expand(-1, 3, -1, -1)))


def test_the_derivative_is_that_of_finite_differences():
    torch.manual_seed(0)
    images = (0.2 + 0.6 * torch.rand(1, 3, 37, 50, dtype=torch.float64)).requires_grad_()
    preprocess, weights = Preprocessing(24, (24, 24)), torch.randn(1, 3, 24, 24, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((preprocess(images) * weights).sum(), images)
    way, h = torch.randn_like(images), 1e-4
    with torch.no_grad():
        ends = [(preprocess(images + s * h * way) * weights).sum() for s in (1, -1)]
    assert abs((gradient * way).sum() - (ends[0] - ends[1]) / (2 * h)) < 4e-10 * max(1, ends[0].abs())


def test_rounding_passes_the_gradient_and_rounds():
    images = torch.rand(1, 3, 50, 50, requires_grad=True)
    assert torch.equal((rounded(images) * 255).round() / 255, rounded(images))
    gradients = []
    for quantise in (True, False):
        pixels = Preprocessing(24, (24, 24), quantise=quantise)(images)
        gradients.append(torch.autograd.grad((pixels**2).sum(), images)[0])
    assert F.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.9999


def test_the_gradient_ends_with_the_crop_and_the_reach_of_the_filter():
    images = torch.rand(1, 3, 64, 160, requires_grad=True)  # to 32 x 80, of which 32 x 32 from 24 on
    Preprocessing(32, (32, 32))(images).square().sum().backward()
    columns = images.grad.abs().sum((0, 1, 2))
    reach = 2 * 2  # two pixels after the resize, twice as many before
    inside = slice(48, 112)
    assert (columns[inside] > 0).all()
    assert not columns[: 48 - reach].any() and not columns[112 + reach :].any()


def reference_padded(array, size):
    """The whole image in a black square, written out for one image."""
    height, width = array.shape[:2]
    scale = size / max(height, width)
    new = (round(height * scale), round(width * scale))
    small = F.interpolate(floats(array), new, mode="bicubic", antialias=True)[0]
    square = torch.zeros(3, size, size)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    square[:, top : top + new[0], left : left + new[1]] = small
    return (square - MEAN) / STD


@pytest.mark.parametrize("size", [(180, 300), (300, 181), (224, 100), (64, 64)])
def test_the_whole_image_in_a_square(size):
    array = picture("noise", *size)
    pixels = padded(floats(array), 224)
    torch.testing.assert_close(pixels[0], reference_padded(array, 224))
    assert max(fitted(*size, 224)) == 224
    rounded_first = padded(floats(array) + 0.001, 224, quantise=True)
    torch.testing.assert_close(rounded_first, pixels)
    if size != (64, 64) and size != (224, 100):  # an image that grows, or that keeps its size, has no aliasing to lose
        assert (padded(floats(array), 224, antialias=False) - pixels).abs().mean() > 1e-2


BASE = dict(image_mean=[0.5] * 3, image_std=[0.25] * 3, resample=2)


@pytest.mark.parametrize(
    ("settings", "size", "crop"),
    [
        (dict(size=16), (16, 16), None),
        (dict(size={"height": 16, "width": 12}), (16, 12), None),
        (dict(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}), 20, (16, 16)),
        (dict(size={"shortest_edge": 20}, crop_size=16, do_center_crop=True), 20, (16, 16)),
        (dict(size=20, crop_size=16, do_center_crop=False), (20, 20), None),
        (dict(size=224, crop_pct=0.875), 256, (224, 224)),
        (dict(size={"shortest_edge": 384}, crop_pct=0.875), (384, 384), (384, 384)),
    ],
)
def test_the_forms_in_which_transformers_store_sizes(settings, size, crop):
    made = Preprocessing.from_settings(json.loads(json.dumps(BASE | settings)), quantise=True)
    assert (made.size, made.crop, made.mode, made.mean, made.std) == (size, crop, "bilinear", (0.5,) * 3, (0.25,) * 3)
    assert made.quantise
    pixels = made(torch.rand(1, 3, 500, 600))
    assert pixels.shape[-2:] == (crop or size)


def test_images_need_not_be_normalised():
    made = Preprocessing.from_settings(dict(size=8, do_normalize=False))
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(made(images), images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(size=16, resample=0), "resample=0"),
        (dict(size={"shortest_edge": 16}), "several sizes"),
        (dict(size={"longest_edge": 16}), "accepted are a number"),
        (dict(), "size=None"),
        (dict(size=16, crop_size=20), "larger than"),
        (dict(size=16, rescale_factor=1 / 127.5), "rescale_factor"),
        (dict(size=16, do_rescale=False), "do_rescale"),
        (dict(size=16, do_resize=False), "do_resize"),
        (dict(size=16, rescale_offset=True), "rescale_offset"),
    ],
)
def test_preprocessing_that_is_not_known_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_settings(BASE | settings)
