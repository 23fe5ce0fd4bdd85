"""DISTS and EA-DISTS: closed forms, and torchmetrics' own DISTS on the same weights."""

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from genkit.perceptual import DISTS, EADISTS, sobel

F64 = torch.float64
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def vgg(widths=(4, 6, 8, 8, 8), prefix="features."):
    """Random weights of a narrow VGG16."""
    state, channels = {}, 3
    for width, stage in zip(widths, STAGES, strict=True):
        for i in stage:
            state[f"{prefix}{i}.weight"] = torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
            state[f"{prefix}{i}.bias"] = torch.randn(width) * 0.1
            channels = width
    return state


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 32, 24, dtype=F64), torch.rand(3, 3, 32, 24, dtype=F64)


# -- closed forms ---------------------------------------------------------------------------------------------------


def test_sobel_of_a_constant_and_of_a_ramp():
    ones = sobel(torch.ones(1, 3, 6, 7, dtype=F64))
    assert ones.shape == (1, 3, 6, 7)
    torch.testing.assert_close(ones[..., 1:-1, 1:-1], torch.full((1, 3, 4, 5), 1e-3, dtype=F64), rtol=1e-12, atol=0)
    assert ones[0, 0, 0, 3].item() == pytest.approx(4.0, abs=1e-6)
    assert ones[0, 0, 0, 0].item() == pytest.approx(4.24, abs=3e-3)
    ramp = torch.arange(7, dtype=F64).expand(1, 3, 6, 7)
    assert sobel(ramp)[..., 1:-1, 1:-1].sub(8.0).abs().max() < 1e-6
    assert sobel(ramp.transpose(2, 3))[..., 1:-1, 1:-1].sub(8.0).abs().max() < 1e-6


def test_reflected_borders_are_no_edges():
    flat = sobel(torch.ones(1, 3, 6, 7, dtype=F64), "reflect")
    torch.testing.assert_close(flat, torch.full_like(flat, 1e-3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_a_distance(padding, pictures):
    x, y = pictures
    metric = EADISTS(DISTS(vgg()), padding).double()
    assert metric(x, x).abs().max() == 0
    assert (metric(x, y) > 0).all()
    torch.testing.assert_close(metric(x, y), metric(y, x), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        metric(x, y), metric.dists(x, y) + metric.dists(sobel(x, padding), sobel(y, padding)), rtol=1e-12, atol=0
    )
    alone = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, metric(x, y), rtol=1e-10, atol=0)


def test_flat_regions_have_finite_gradients():
    x = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    EADISTS(DISTS(vgg()))(x, torch.rand(1, 3, 16, 16)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert not any(p.requires_grad for p in DISTS(vgg()).parameters())


def test_means_and_variances_of_the_picture_itself():
    """With all weight on the picture's channels the network drops out: the formula by hand."""
    x, y = torch.rand(1, 3, 8, 8, dtype=F64), torch.rand(1, 3, 8, 8, dtype=F64)
    alpha, beta = torch.zeros(37), torch.zeros(37)
    alpha[:3], beta[:3] = 2.0, 1.0
    mx, my, vx, vy = x.mean((2, 3)), y.mean((2, 3)), x.var((2, 3), correction=0), y.var((2, 3), correction=0)
    cov = (x * y).mean((2, 3)) - mx * my
    light = (2 * mx * my + 1e-6) / (mx**2 + my**2 + 1e-6)
    structure = (2 * cov + 1e-6) / (vx + vy + 1e-6)
    expected = 1 - (2 * light.sum() + structure.sum()) / 9
    assert DISTS(vgg(), alpha, beta).double()(x, y).item() == pytest.approx(expected.item(), rel=1e-10)


def test_autocast_does_not_reach_it(pictures):
    x, y = (p.float() for p in pictures)
    metric = EADISTS(DISTS(vgg()))
    plain = metric(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(metric(x, y), plain)


def test_grey_pictures_are_three_equal_channels():
    x, y = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)
    metric = EADISTS(DISTS(vgg()))
    torch.testing.assert_close(metric(x, y), metric(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))


# -- weights --------------------------------------------------------------------------------------------------------


def test_is_the_distance_of_torchmetrics(tmp_path, monkeypatch, caplog):
    """The published weights, by torchmetrics' own function on the same VGG16, whose weights here are random."""
    dists = pytest.importorskip("torchmetrics.functional.image.dists")
    layers = pytest.importorskip("torchvision.models.vgg")
    features = layers.make_layers(layers.cfgs["D"])
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data.mul_(6**0.5)  # so that activations neither grow nor vanish
    monkeypatch.setattr(dists, "vgg16", lambda weights: SimpleNamespace(features=features))
    save_file({f"features.{k}": v for k, v in features.state_dict().items()}, tmp_path / "vgg16.safetensors")
    ours = DISTS.load(tmp_path / "vgg16.safetensors")
    assert "equal" not in caplog.text and not torch.equal(ours.alpha, ours.beta)
    x = torch.rand(2, 3, 32, 24)
    y = torch.stack((torch.rand(3, 32, 24), x[1] + 0.05 * torch.randn(3, 32, 24)))
    theirs = dists.deep_image_structure_and_texture_similarity(x, y)
    torch.testing.assert_close(ours(x, y), theirs.detach(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_without_published_weights_they_are_equal_and_it_says_so(suffix, tmp_path, caplog):
    state, file = vgg(), tmp_path / f"vgg.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    with caplog.at_level(logging.WARNING):
        loaded = DISTS.load(file)
    assert "weights are equal" in caplog.text and "not as wide as VGG16" in caplog.text
    assert torch.equal(loaded.alpha, torch.ones(37)) and torch.equal(loaded.beta, loaded.alpha)
    x, y = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(x, y), DISTS(vgg_like(state))(x, y))


def vgg_like(state):
    return {name.removeprefix("features."): tensor for name, tensor in state.items()}


def test_without_torchmetrics_they_are_equal(tmp_path, monkeypatch, caplog):
    state = vgg((64, 128, 256, 512, 512))
    save_file(state, tmp_path / "vgg.safetensors")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchmetrics" else found(name))
    assert torch.equal(DISTS.load(tmp_path / "vgg.safetensors").alpha, torch.ones(1475))
    assert "install torchmetrics" in caplog.text


def test_torchvision_is_asked_by_name(monkeypatch):
    models = pytest.importorskip("torchvision.models")
    asked, state = [], vgg()
    monkeypatch.setattr(models.VGG16_Weights, "get_state_dict", lambda self, **k: asked.append(self.name) or state)
    DISTS.load("torchvision")
    assert asked == ["IMAGENET1K_V1"]


# -- bad input ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    state = vgg(prefix="")
    with pytest.raises(ValueError, match="alpha has 5 weights; VGG and picture have 37 channels"):
        DISTS(state, alpha=torch.ones(5))
    del state["14.weight"]
    with pytest.raises(ValueError, match=r"vgg lacks \['14.weight'\]"):
        DISTS(state)
    with pytest.raises(FileNotFoundError, match="vgg='nowhere.pth' is neither a file of weights nor 'torchvision'"):
        DISTS.load("nowhere.pth")
    with pytest.raises(ValueError, match="padding='reflected' is not known; did you mean 'reflect'"):
        EADISTS(DISTS(vgg()), "reflected")
    for shapes in (((1, 3, 8, 8), (1, 3, 8, 9)), ((1, 2, 8, 8),) * 2, ((3, 8, 8),) * 2):
        with pytest.raises(ValueError, match="accepted are two"):
            DISTS(vgg())(*(torch.rand(s) for s in shapes))
