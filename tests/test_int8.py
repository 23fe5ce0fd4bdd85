import importlib.util

import pytest
import torch
from torch import nn

from genkit import int8


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.SiLU(), nn.Conv2d(8, 8, 1, groups=2, bias=False), nn.Flatten()
    )
    return nn.Sequential(layers, nn.Linear(8 * 16, 10), nn.LayerNorm(10), nn.Linear(10, 3, bias=False)).requires_grad_(
        False
    )


def test_weights_are_rounded_by_channel():
    layer = nn.Linear(30, 5).requires_grad_(False)
    rounded = int8.Int8Linear(layer)
    scale = layer.weight.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(rounded.weight, (layer.weight / scale).round() * scale)
    assert (rounded.weight - layer.weight).abs().max() <= scale.max() / 2 + 1e-7
    assert rounded.values.dtype == torch.int8 and rounded.values.abs().amax(1).eq(127).all()


def test_output_is_close_and_memory_a_quarter():
    exact, small = network(), int8.quantize(network())
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(small(x), exact(x), rtol=0, atol=0.03)
    assert not torch.equal(small(x), exact(x))
    bytes_of = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in (exact, small)]
    assert bytes_of[1] < 0.4 * bytes_of[0]
    assert small[2].weight.dtype == torch.float32  # norms stay


def test_restored_layers_compute_the_same():
    small = int8.quantize(network())
    x = torch.randn(2, 4, 8, 8)
    before = small(x)
    whole = int8.restore(small)
    assert not any(isinstance(m, int8.Int8Weight) for m in whole.modules())
    assert torch.equal(whole(x), before)


def test_zero_channels_and_half_precision():
    layer = nn.Linear(6, 4).requires_grad_(False)
    layer.weight[1] = 0
    assert int8.Int8Linear(layer).weight[1].eq(0).all() and int8.Int8Linear(layer).weight.isfinite().all()
    half = int8.Int8Linear(layer.bfloat16())
    assert half.weight.dtype == torch.bfloat16 and half(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_it_is_saved_and_moved_like_any_module():
    small, other = int8.quantize(network()), int8.quantize(network())
    for weight in other.parameters():
        weight.zero_()
    other.load_state_dict(small.state_dict())
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(other(x), small(x))
    values = [[m.values for m in net.modules() if isinstance(m, int8.Int8Weight)] for net in (small, other)]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(small.state_dict() | {"1.weight": torch.zeros(10, 7)})
    assert small.double()(x.double()).dtype == torch.float64


def test_state_is_that_of_the_ordinary_layers():
    small, plain = int8.quantize(network()), network()
    plain.load_state_dict(small.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(plain(x), small(x))


@pytest.mark.parametrize("name", ["sd15", "sd3", "dit"])
def test_a_saved_pipeline_has_the_rounded_weights(name, tiny_pipeline, tmp_path):
    pipe = tiny_pipeline(name)
    parts = [k for k, v in pipe.components.items() if isinstance(v, nn.Module)]
    for part in parts:
        int8.quantize(pipe.components[part].requires_grad_(False))
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    for part in parts:
        state = pipe.components[part].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in again.components[part].state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_by_the_scale_that_it_has(dtype):
    layer = nn.Linear(200, 300).requires_grad_(False).to(dtype)
    rounded = int8.Int8Linear(layer)
    step = rounded.scale.float()
    off = (rounded.values * step - layer.weight.float()).abs() / step
    inside = rounded.values.abs() < 127
    assert off[inside].max() <= 0.5 + 1e-4 and rounded.values.abs().max() == 127 and off.max() < 1
    tiny = nn.Linear(4, 4).requires_grad_(False).to(dtype)
    tiny.weight.fill_(torch.finfo(dtype).tiny)  # less than 127 steps
    assert int8.Int8Linear(tiny).weight.isfinite().all()


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_of_any_dimension(kind):
    n = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    plain = nn.Sequential(kind(4, 6, 3, padding="same", dilation=2, groups=2)).requires_grad_(False)
    x = torch.randn(2, 4, *[7] * n)
    before = plain(x)
    small = int8.quantize(plain)
    after = small(x)
    assert isinstance(small[0], int8.Int8Conv) and 0 < (after - before).abs().max() < 0.02
    whole = int8.restore(small)
    assert type(whole[0]) is kind and torch.equal(whole(x), after)


def test_a_layer_in_two_places_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    net = int8.quantize(Twice().requires_grad_(False))
    assert isinstance(net.first, int8.Int8Linear) and net.first is net.second
    x = torch.randn(3, 4)
    before = net(x)
    whole = int8.restore(net)
    assert type(whole.first) is nn.Linear and whole.first is whole.second and torch.equal(whole(x), before)


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_other_packages_where_they_are_installed(package):
    pytest.importorskip(package)
    net = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8)).requires_grad_(False)
    x = torch.randn(3, 64)
    before = net(x)
    after = int8.quantize(net, package)(x)
    assert 0 < (after - before).abs().max() < 0.02
    with pytest.raises(ValueError, match="the layer 0 is quantised by another package"):
        int8.restore(net)


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="quantization='int4'.*Accepted"):
        int8.quantize(network(), "int4")
    with pytest.raises(ValueError, match="0.0.weight trains; freeze it"):
        int8.quantize(network().requires_grad_(True))
    with pytest.raises(ValueError, match="a bare Linear cannot be replaced in place; put it into a module"):
        int8.quantize(nn.Linear(3, 3).requires_grad_(False))
    with pytest.raises(ValueError, match="a bare Int8Linear cannot be replaced in place"):
        int8.restore(int8.Int8Linear(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="padding_mode='circular' of a convolution; int8 takes zeros"):
        int8.quantize(nn.Sequential(nn.Conv2d(3, 3, 3, padding_mode="circular")).requires_grad_(False))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchao, or take quantization='int8'"):
        int8.quantize(network(), "torchao")

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.weight = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)

    with pytest.raises(ValueError, match=r"the layer inner is quantised by another package \(torch.int8\) and cannot"):
        int8.restore(Foreign())
