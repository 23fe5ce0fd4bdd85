import numpy as np
import pytest
import torch
from torch.nn import functional as F

from genkit.eval.resize import RULES

SIZES = [(32, 32), (64, 48), (256, 256), (299, 299), (300, 420)]


def noise(height, width, n=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def as_array(images):
    return images[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", SIZES)
def test_form_and_range(rule, size):
    images = noise(*size, n=2)
    before = images.clone()
    out = RULES[rule](images, 299)
    assert out.shape == (2, 3, 299, 299) and out.dtype == torch.float32
    assert torch.equal(images, before)
    torch.testing.assert_close(RULES[rule](images[1:], 299), out[1:], rtol=0, atol=1e-4)  # neighbours do not matter
    if rule != "bicubic":  # the one that overshoots and is not clipped
        assert out.min() >= 0 and out.max() <= 255


@pytest.mark.parametrize("rule", RULES)
def test_images_of_the_size_stay(rule):
    images = noise(299, 299)
    assert torch.equal(RULES[rule](images, 299), images.float())


@pytest.mark.parametrize("size", SIZES)
def test_clean_and_pytorch_are_those_of_clean_fid(size):
    resizers = pytest.importorskip("cleanfid.resize")
    images = noise(*size)
    for rule, mode in (("clean", "clean"), ("pytorch", "legacy_pytorch")):
        ours = as_array(RULES[rule](images, 299))
        np.testing.assert_allclose(ours, resizers.build_resizer(mode)(as_array(images)), rtol=0, atol=5e-5)


@pytest.mark.parametrize("size", SIZES)
def test_pil_is_the_quantised_resizer_of_clean_fid(size):
    resizers = pytest.importorskip("cleanfid.resize")
    images = noise(*size)
    theirs = resizers.make_resizer("PIL", True, "bicubic", (224, 224))(as_array(images))
    assert np.array_equal(as_array(RULES["pil"](images, 224)), theirs)


@pytest.mark.parametrize("size", SIZES)
def test_torch_rules(size):
    images = noise(*size)
    for rule, mode, antialias in (("antialias", "bilinear", True), ("bicubic", "bicubic", True)):
        wanted = F.interpolate(images.float(), (224, 224), mode=mode, antialias=antialias, align_corners=False)
        assert torch.equal(RULES[rule](images, 224), wanted)


@pytest.mark.parametrize("size", [(5, 7), (32, 32), (40, 61)])
def test_tf1_by_its_formula(size):
    # One pixel at a time, from the definition: the source of pixel i is i (in / out), in float32 as TensorFlow has it,
    # whole and remainder.
    images, side = noise(*size), 23
    x = images[0].double()
    wanted = torch.empty(3, side, side, dtype=torch.float64)
    height, width = size
    for i in range(side):
        for j in range(side):
            y, z = (float(np.float32(k) * np.float32(length / side)) for k, length in ((i, height), (j, width)))
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, height - 1), min(z0 + 1, width - 1)
            a, b = y - y0, z - z0
            top = (1 - b) * x[:, y0, z0] + b * x[:, y0, z1]
            wanted[:, i, j] = (1 - a) * top + a * ((1 - b) * x[:, y1, z0] + b * x[:, y1, z1])
    torch.testing.assert_close(RULES["tf1"](images, side)[0].double(), wanted, rtol=0, atol=5e-5)


def test_tf1_keeps_the_first_pixel_and_half_pixel_rules_do_not():
    images = noise(64, 64)
    assert torch.equal(RULES["tf1"](images, 32), images[..., ::2, ::2].float())
    assert not torch.equal(RULES["pytorch"](images, 32), images[..., ::2, ::2].float())


def pink(side, seed):
    """Images whose amplitude falls as 1/f, as that of photographs does."""
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    radius[0, 0] = np.inf
    shape = (3, *radius.shape)
    image = np.fft.irfft2((rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / radius, s=(side, side))
    image = 127.5 + 50 * image / image.std()
    return torch.from_numpy(image.round().clip(0, 255).astype(np.uint8))[None]


def distance_to_clean(rule, side):
    images = pink(side, seed=0)
    return float((RULES[rule](images, 299) - RULES["clean"](images, 299)).square().mean().sqrt())


# Measured on other images of the same kind: root mean square in grey levels, from sides of 32, 256, 512 and 1024.
PUBLISHED = {"antialias": (5.4, 4.7, 4.2, 3.8), "pytorch": (5.4, 4.7, 7.8, 16.2), "tf1": (23.0, 5.8, 12.9, 23.6)}


def test_distances_to_clean():
    sides = (32, 256, 512, 1024)
    rmse = {rule: [distance_to_clean(rule, side) for side in sides] for rule in RULES}
    for rule, levels in PUBLISHED.items():
        assert rmse[rule] == pytest.approx(levels, rel=0.15)  # levels depend on how the images are made and scaled
    assert rmse["pytorch"][:2] == pytest.approx(rmse["antialias"][:2], rel=1e-4)  # nothing is aliased in what grows
    assert max(rmse["pil"]) < 0.5  # rounding, and the clipping between passes
    assert max(rmse["bicubic"]) < rmse["pil"][0]  # clipping alone
