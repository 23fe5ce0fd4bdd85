"""LPIPS: the authors' package and torchmetrics on the same weights, and what must hold of a distance."""

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from genkit.perceptual import LPIPS
from genkit.perceptual.lpips import _LEAST, _unit
from tests.test_perceptual import vgg

NETS = ("alex", "vgg", "squeeze")
MODELS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


@pytest.fixture(scope="module")
def backbones():
    """torchvision's own classifiers with random weights, strong enough that features do not fade away."""
    models = pytest.importorskip("torchvision.models")
    made = {}
    for net, name in MODELS.items():
        torch.manual_seed(0)
        with torch.device("meta"):  # without drawing the weights of its many other layers
            features = getattr(models, name)(weights=None).features
        features.to_empty(device="cpu")
        for layer in features.modules():
            if isinstance(layer, torch.nn.Conv2d):
                fan = layer.weight[0].numel()
                layer.weight.data.normal_(0, (2 / fan) ** 0.5)
                layer.bias.data.normal_(0, 0.05)
        made[net] = features
    return made


@pytest.fixture
def pictures():
    x = torch.rand(2, 3, 41, 35)
    return x, torch.stack((torch.rand(3, 41, 35), (x[1] + 0.05 * torch.randn(3, 41, 35)).clamp(0, 1)))


def saved(features, path):
    save_file({f"features.{k}": v for k, v in features.state_dict().items()}, path)
    return path


def small():
    return vgg((4, 6, 8, 8, 8))


@pytest.mark.parametrize("net", NETS)
def test_is_the_distance_of_the_authors_package(net, backbones, pictures, tmp_path, monkeypatch, caplog):
    lpips = pytest.importorskip("lpips")
    networks = SimpleNamespace(features=backbones[net])
    monkeypatch.setattr(lpips.pretrained_networks.tv, MODELS[net], lambda pretrained: networks)
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    ours = LPIPS.load(net, saved(backbones[net], tmp_path / "net.safetensors"))
    assert ours.learned and not caplog.text
    x, y = pictures
    want = theirs(2 * x - 1, 2 * y - 1).detach().flatten()
    torch.testing.assert_close(ours(x, y), want, rtol=2e-5, atol=1e-7)
    assert (want > 1e-3).all()
    torch.testing.assert_close(ours.double()(x.double(), y.double()), want.double(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("net", NETS)
def test_differs_from_torchmetrics_by_its_eps(net, backbones, pictures, tmp_path, monkeypatch):
    """By what it adds to lengths: to nothing for features of ordinary size, by orders of magnitude for small ones."""
    module = pytest.importorskip("torchmetrics.functional.image.lpips")
    monkeypatch.setattr(module, "_get_tv_model_features", lambda name, pretrained=False: backbones[net])
    theirs = module._LPIPS(net=net).double()
    ours = LPIPS.load(net, saved(backbones[net], tmp_path / "net.safetensors")).double()
    x, y = (p.double() for p in pictures)
    torch.testing.assert_close(ours(x, y), theirs(2 * x - 1, 2 * y - 1).detach().flatten(), rtol=1e-6, atol=1e-9)
    faint = 1e-6 * torch.rand(1, 5, 3, 3, dtype=torch.float64)
    norm = faint.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(module._normalize_tensor(faint), faint / (norm.square() + 1e-8).sqrt())
    torch.testing.assert_close(_unit(faint), faint / norm, rtol=1e-3, atol=0)
    assert (module._normalize_tensor(faint).norm(dim=1) < 0.03).all()


def test_by_hand_on_a_network_of_one_channel():
    """VGG whose filters copy one colour: unit features are 1 where there is light, so only darkness can differ."""
    state = {}
    for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        for i in stage:
            state[f"{i}.weight"], state[f"{i}.bias"] = torch.zeros(1, 3 if i == 0 else 1, 3, 3), torch.zeros(1)
            state[f"{i}.weight"][0, 0, 1, 1] = 1.0
    weights = [torch.tensor([w]) for w in (1.0, 2.0, 4.0, 8.0, 16.0)]
    dark, half = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    half[..., 8:] = 1.0
    # Black is below the mean of the scaling layer: features 0. A half is lit at every stage but the last, of one pixel.
    got = LPIPS("vgg", state, weights)(half, dark)
    assert got.item() == pytest.approx(0.5 * (1 + 2 + 4 + 8) + 16, rel=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_a_distance_whose_gradient_reaches_the_pictures_alone(net, backbones):
    size = _LEAST[net]
    x = torch.rand(3, 3, size, size, requires_grad=True)
    y = torch.rand(3, 3, size, size)
    metric = LPIPS(net, backbones[net].state_dict())
    assert metric(x, x).abs().max() == 0 and (metric(x, y) > 0).all()
    assert torch.equal(metric(x, y), metric(y, x))
    metric(x, y).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert not any(p.requires_grad for p in metric.parameters())
    alone = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, metric(x, y), rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=f"net='{net}' takes {size} at least"):
        metric(x[..., 1:], y[..., 1:])


def test_gradient_is_the_slope():
    metric = LPIPS("vgg", small()).double()
    x, y, d = (torch.rand(1, 3, 16, 16, dtype=torch.float64) for _ in range(3))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(metric(x, y), x)
    steps = [metric(x.detach() + h * d, y) for h in (1e-6, -1e-6)]
    assert (slope * d).sum().item() == pytest.approx((steps[0] - steps[1]).item() / 2e-6, rel=1e-5)


def test_features_that_are_all_zero_have_finite_gradients():
    state = {k: v if k.endswith("weight") else v - 100 for k, v in small().items()}
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    LPIPS("vgg", state)(x, torch.rand(1, 3, 16, 16)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_grey_pictures_and_autocast():
    metric = LPIPS("vgg", small())
    x, y = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)
    plain = metric(x, y)
    torch.testing.assert_close(plain, metric(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(metric(x, y), plain)
    assert metric(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_without_published_weights_they_are_one_and_it_says_so(tmp_path, monkeypatch, caplog, backbones):
    save_file(small(), tmp_path / "small.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = LPIPS.load("vgg", tmp_path / "small.safetensors")
    assert "backbone=" in caplog.text and "not as wide" in caplog.text and not loaded.learned
    caplog.clear()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("torchmetrics", "lpips") else found(name)
    )
    wide = LPIPS.load("squeeze", saved(backbones["squeeze"], tmp_path / "wide.safetensors"))
    assert "install torchmetrics" in caplog.text and not wide.learned


@pytest.mark.parametrize("net", NETS)
def test_torchvision_is_asked_by_name(net, backbones, monkeypatch):
    models = pytest.importorskip("torchvision.models")
    weights = {"alex": models.AlexNet_Weights, "vgg": models.VGG16_Weights, "squeeze": models.SqueezeNet1_1_Weights}
    asked, state = [], backbones[net].state_dict()
    monkeypatch.setattr(weights[net], "get_state_dict", lambda self, **k: asked.append(self.name) or state)
    assert LPIPS.load(net, "torchvision").net == net
    assert asked == ["IMAGENET1K_V1"]


def test_what_does_not_fit_is_refused():
    state = small()
    with pytest.raises(ValueError, match="net='vgg16' is not known; did you mean 'vgg'"):
        LPIPS("vgg16", state)
    with pytest.raises(ValueError, match="net='vgg16' is not known"):
        LPIPS.load("vgg16", "nowhere.pth")
    with pytest.raises(ValueError, match="weights of .* channels; the stages of net='vgg' have"):
        LPIPS("vgg", state, [torch.ones(4)] * 5)
    with pytest.raises(ValueError, match=r"backbone lacks '3.weight': .* net='alex'"):
        LPIPS("alex", {k: v for k, v in state.items() if ".0." in k})
    with pytest.raises(FileNotFoundError, match="backbone='nowhere.pth' is neither a file of weights nor 'torchv"):
        LPIPS.load("alex", "nowhere.pth")
    for shapes in (((1, 3, 16, 16), (1, 3, 16, 17)), ((1, 2, 16, 16),) * 2, ((3, 16, 16),) * 2):
        with pytest.raises(ValueError, match="accepted are two"):
            LPIPS("vgg", state)(*(torch.rand(s) for s in shapes))
