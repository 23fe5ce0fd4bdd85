"""SaRA on any module: what is selected, what trains, what the low-rank term and the adjustment do."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from genkit._smallest import kth_smallest
from genkit.sara import add_rank_gradient, add_sara, lowerable, merge_sara, remove_sara, sara_layers, shrink
from genkit.sara import without_sara as switched_off


def mlp(width=128, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)).to(dtype)


def rows(width=128, dtype=torch.float32):
    return torch.randn(8, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def weights(network):
    return {n: p.detach().clone() for n, p in network.named_parameters()}


def train(network, x, steps=5, lr=1e-2):
    """Adam on what trains."""
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_wrapping_changes_no_bit_and_training_none_but_the_selected(dtype):
    network, x = mlp(dtype=dtype), rows(dtype=dtype)
    before, start = network(x).detach(), weights(network)
    layers = add_sara(network, threshold=2e-2)
    assert torch.equal(network(x), before)
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {
        f"{i}.parametrizations.weight.0.delta" for i in (0, 2)
    }
    assert all(s.delta.dtype == torch.promote_types(dtype, torch.float32) for s in layers.values())
    train(network, x)
    moved = network(x).detach()
    assert (moved - before).abs().max() > 1e-2
    with switched_off(network):
        assert torch.equal(network(x), before)
        assert torch.equal(network(x).detach(), before)
    assert torch.equal(network(x), moved)
    merge_sara(network)
    assert torch.equal(network(x), moved) and [type(m) for m in network] == [nn.Linear, nn.SiLU, nn.Linear]
    for name, sara in layers.items():
        selected = torch.zeros(start[name].numel(), dtype=torch.bool)
        selected[sara.index] = True
        now, then = dict(network.named_parameters())[name].flatten(), start[name].flatten()
        assert torch.equal(now[~selected], then[~selected])
        assert (now[selected] != then[selected]).double().mean() > 0.9
        assert torch.equal(selected, then.float().abs() < 2e-2)
    assert torch.equal(network[0].bias, start["0.bias"])


def test_removing_gives_the_former_weights_back():
    network, x = mlp(), rows()
    start, before = weights(network), network(x)
    add_sara(network, threshold=2e-2)
    other = copy.deepcopy(network)
    train(network, x)
    remove_sara(network)
    assert all(torch.equal(p, start[n]) for n, p in network.named_parameters()) and not sara_layers(network)
    train(other, x)  # a copy is another network
    assert not torch.equal(other(x), before) and torch.equal(network(x), before)


def test_selected_weights_keep_their_sign_at_the_start():
    """The released code writes the absolute values: about 3,825 of 32,768 weights flip here, and the output is off."""
    network, x = mlp(), rows()
    before = network(x).detach()
    layers = add_sara(network, threshold=2e-2)
    assert torch.equal(network(x), before)
    flipped = sum(int((sara.values < 0).sum()) for sara in layers.values())
    assert flipped == pytest.approx(3825, rel=0.05)
    with torch.no_grad():
        for sara in layers.values():
            sara.delta.copy_(sara.base.abs() - sara.base)
    assert (network(x) - before).abs().max() > 0.1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-7)])
def test_the_gradient_is_the_dense_one_at_the_selected_places(dtype, tolerance):
    network, x = mlp(dtype=dtype), rows(dtype=dtype)
    dense = copy.deepcopy(network)
    dense(x).square().mean().backward()
    layers = add_sara(network, threshold=2e-2)
    network(x).square().mean().backward()
    for name, sara in layers.items():
        expected = dict(dense.named_parameters())[name].grad.flatten()[sara.index]
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(sara.delta.grad, expected, rtol=0, atol=tolerance)
    assert all(p.grad is None for n, p in network.named_parameters() if "delta" not in n)


def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward():
    """Neither a copy of a weight nor, after it, its gradient."""
    network, x = mlp(), rows()
    add_sara(network, threshold=2e-2)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = []

    def pack(tensor):
        if tensor.numel() >= 128 * 128:
            kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x).square().mean().backward()
    assert kept and set(kept) <= own
    assert sum(p.grad.numel() for p in network.parameters() if p.grad is not None) < 0.3 * 2 * 128 * 128


def test_two_calls_before_a_backward_and_one_switched_off_between():
    network, x = mlp(dtype=torch.float64), rows(dtype=torch.float64)
    layers = add_sara(network, threshold=2e-2)
    train(network, x, steps=1)
    delta = layers["0.weight"].delta
    both = []
    for between in (False, True):
        network.zero_grad()
        first = network(x).square().mean()
        if between:
            with torch.no_grad(), switched_off(network):
                network(x + 1)
        (first + network(x + 1).square().mean()).backward()
        both.append(delta.grad.clone())
    assert torch.equal(*both) and both[0].abs().max() > 1e-6
    # Through the network as it was, a gradient reaches its input alone.
    network.zero_grad()
    inputs = x.clone().requires_grad_(True)
    with switched_off(network):
        off = network(inputs).square().mean()
    off.backward()
    base = copy.deepcopy(network)
    remove_sara(base)
    (expected,) = torch.autograd.grad(base(inputs).square().mean(), inputs)
    assert torch.equal(inputs.grad, expected) and delta.grad is None


def test_a_change_before_the_backward_is_noticed():
    """As that of any weight is: the gradient would be that of another network."""
    network, x = mlp(), rows()
    layers = add_sara(network, threshold=2e-2)
    loss = network(x).square().mean()
    with torch.no_grad():
        layers["2.weight"].delta += 0.1
        network(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_and_checkpointing():
    network, x = mlp(), rows()
    layers = add_sara(network, threshold=2e-2)
    train(network, x, steps=1)
    grads = {}
    for how in ("plain", "checkpoint", "reentrant", "bf16"):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16", cache_enabled=False):
            if how in ("checkpoint", "reentrant"):
                out = checkpoint(network, x.clone().requires_grad_(True), use_reentrant=how == "reentrant")
            else:
                out = network(x)
        out.float().square().mean().backward()
        grads[how] = layers["0.weight"].delta.grad.clone()
    assert torch.equal(grads["plain"], grads["checkpoint"]) and torch.equal(grads["plain"], grads["reentrant"])
    assert grads["bf16"].dtype == torch.float32 and not torch.equal(grads["bf16"], grads["plain"])
    torch.testing.assert_close(grads["bf16"], grads["plain"], rtol=0.1, atol=1e-2 * grads["plain"].abs().max().item())


def test_small_updates_of_a_half_precision_weight_are_not_lost():
    network = mlp(dtype=torch.bfloat16)
    sara = add_sara(network, threshold=2e-2)["0.weight"]
    large = sara.base.float().abs() > 2e-3
    alone = sara.base.clone()
    with torch.no_grad():
        for _ in range(1000):
            sara.delta += 1e-6
            alone += 1e-6
    gained = (network[0].weight.detach().flatten()[sara.index] - sara.base).float()[large]
    assert float(gained.mean()) == pytest.approx(1e-3, rel=0.05) and torch.equal(alone[large], sara.base[large])


def test_a_network_that_is_moved_to_half_precision():
    network = mlp()
    sara = add_sara(network, threshold=2e-2)["0.weight"]
    with torch.no_grad():
        sara.delta += 1.2345678e-4
    before = sara.delta.detach().clone()
    network.to(torch.bfloat16)
    assert torch.equal(sara.delta, before) and sara.delta.dtype == torch.float32 and sara.delta.requires_grad
    assert sara.base.dtype == network[0].weight.dtype == torch.bfloat16
    network(rows(dtype=torch.bfloat16)).float().square().mean().backward()
    assert sara.delta.grad.dtype == torch.float32 and sara.delta.grad.any()
    network.double()
    assert sara.delta.dtype == network[0].weight.dtype == torch.float64


def test_forward_mode():
    network, x = mlp(dtype=torch.float64), rows(dtype=torch.float64)
    layers = add_sara(network, threshold=2e-2)
    train(network, x, steps=1)
    out, tangent = torch.func.jvp(network, (x,), (x,))
    step = 1e-6
    torch.testing.assert_close(
        tangent, (network(x + step * x) - network(x - step * x)) / (2 * step), rtol=1e-6, atol=1e-8
    )
    network.zero_grad()
    out.square().mean().backward()
    ours = layers["0.weight"].delta.grad.clone()
    network.zero_grad()
    network(x).square().mean().backward()
    torch.testing.assert_close(ours, layers["0.weight"].delta.grad, rtol=1e-12, atol=1e-15)


def rank_gradient(sara, shape, **settings):
    sara.delta.grad = None
    add_rank_gradient(sara, shape, 1.0, **settings)
    return sara.delta.grad.clone()


@pytest.mark.parametrize("layer", [nn.Linear(20, 30), nn.Conv2d(4, 12, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize("target", ["weight", "delta"])
def test_the_nuclear_norm_s_gradient(layer, target):
    """Against a finite difference along a direction, on a matrix of full rank."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    layers = add_sara(layer, threshold=float(layer.weight.detach().abs().median()))
    ((sara, shape),) = lowerable(layer)
    assert layers == {"weight": sara}
    with torch.no_grad():
        sara.delta.normal_(std=0.1)

    def norm():
        matrix = torch.zeros(shape.numel(), dtype=torch.float64)
        matrix[sara.index] = sara.values if target == "weight" else sara.delta
        return torch.linalg.matrix_norm(matrix.view(shape[0], -1), "nuc")

    gradient, direction, step = rank_gradient(sara, shape, target=target), torch.randn_like(sara.delta), 1e-6
    with torch.no_grad():
        sara.delta += step * direction
        above = norm()
        sara.delta -= 2 * step * direction
        slope = (above - norm()) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_the_low_rank_term_changes_the_result():
    """In the released code it does not, by a bit; and lowers the norm that it is about."""
    found = []
    for strength in (0.0, 1.0):
        network, x = mlp(), rows()
        layers = add_sara(network, threshold=2e-2)
        optimizer = torch.optim.Adam([s.delta for s in layers.values()], lr=1e-3)
        for step in range(10):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            add_rank_gradient(*lowerable(network)[step % 2], strength)
            optimizer.step()
        matrix = torch.zeros(128 * 128)
        matrix[layers["0.weight"].index] = layers["0.weight"].values.detach()
        found.append((network(x).detach(), torch.linalg.matrix_norm(matrix.view(128, 128), "nuc")))
    assert (found[0][0] - found[1][0]).abs().max() > 5.7e-3
    assert found[1][1] < 0.8 * found[0][1]


def test_a_matrix_of_rank_one_and_one_of_zeros_have_a_finite_gradient():
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.linspace(1, 2, 16), torch.linspace(-1, 1, 16)) * 1e-3)
        layer.weight[0, 0] = 5.0
    add_sara(layer, threshold=1.0)
    ((sara, shape),) = lowerable(layer)
    gradient = rank_gradient(sara, shape)
    assert gradient.isfinite().all() and 0 < gradient.norm() < 2
    assert torch.equal(rank_gradient(sara, shape, target="delta"), torch.zeros_like(gradient))
    few = mlp(16)
    add_sara(few, num_params=60)
    assert lowerable(few) == []


def test_places_become_fewer_and_the_rest_keeps_its_value():
    network, x = mlp(dtype=torch.float64), rows(dtype=torch.float64)
    layers = add_sara(network, threshold=2e-2)
    train(network, x, steps=8, lr=5e-3)
    was = {n: (s.active.clone(), s.values.detach().clone()) for n, s in layers.items()}
    active, before = shrink(network)
    assert before == sum(len(s.index) for s in layers.values()) and 0 < active < 0.8 * before
    for name, sara in layers.items():
        assert not (sara.active & ~was[name][0]).any()
        assert (sara.values[sara.active].abs() < 2e-2).all() and (sara.values[~sara.active].abs() >= 2e-2).all()
    train(network, x, steps=3)
    for name, sara in layers.items():
        assert torch.equal(sara.values[~sara.active], was[name][1][~sara.active])
        assert not torch.equal(sara.values, was[name][1])
        add_rank_gradient(sara, torch.Size([128, 128]), 1.0)
        assert (sara.delta.grad[~sara.active] == 0).all() and sara.delta.grad.any()
    assert shrink(network)[1] == active


def test_a_number_of_weights_instead_of_a_threshold():
    network = mlp(dtype=torch.float64)
    every = torch.cat([network[i].weight.detach().flatten().float().abs() for i in (0, 2)]).sort().values
    ours = [network[0].weight, network[2].weight]
    assert all(kth_smallest(ours, k) == float(every[k]) for k in (0, 1, 2, 999, 16_384, 32_766, 32_767))
    layers = add_sara(network, num_params=1000)
    assert sum(len(s.index) for s in layers.values()) == 1000
    assert all(s.threshold == float(every[1000]) for s in layers.values())
    # Equal entries, as half precision has them by the thousand, are selected together or not at all.
    coarse = mlp(dtype=torch.bfloat16)
    assert 0 < sum(len(s.index) for s in add_sara(coarse, num_params=1000).values()) <= 1000


class Shared(nn.Module):
    """Two layers of one weight, a layer that starts at zero, a norm and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24)
        self.two.weight = self.one.weight
        self.gate, self.norm, self.table = nn.Linear(24, 24), nn.LayerNorm(24), nn.Embedding(4, 24)
        self.small = nn.Linear(24, 24)
        nn.init.zeros_(self.gate.weight)
        nn.init.uniform_(self.small.weight, -1e-4, 1e-4)

    def forward(self, x):
        return self.norm(self.two(self.one(x)) + self.small(x)) * (1 + self.gate(x))


def test_what_is_left_out_and_what_is_shared():
    network, x = Shared(), torch.randn(4, 24)
    before = network(x)
    layers = add_sara(network, threshold=2e-2)
    assert list(layers) == ["one.weight"]  # one for both; gate and small lie below the threshold as a whole
    sara = layers["one.weight"]
    assert network.one.parametrizations["weight"][0] is network.two.parametrizations["weight"][0] is sara
    assert torch.equal(network(x), before)
    network(x).square().sum().backward()
    dense = Shared()
    dense(x).square().sum().backward()
    torch.testing.assert_close(sara.delta.grad, dense.one.weight.grad.flatten()[sara.index])
    with torch.no_grad():
        sara.delta += 0.1
    merge_sara(network)
    assert network.one.weight is network.two.weight
    assert network.one.weight.flatten()[sara.index[0]] == sara.values[0]
    assert set(add_sara(Shared(), threshold=2e-2, target_modules=["gate", "two"])) == {"two.weight", "gate.weight"}
    assert list(add_sara(Shared(), threshold=5e-5, exclude_modules=["one", "two"])) == ["small.weight"]
    assert list(add_sara(Shared(), num_params=30)) == ["small.weight"]
    other = Shared()
    assert list(add_sara(other, threshold=5e-5, skip=[other.one])) == ["small.weight"]


def test_beside_a_lora():
    network, x = mlp(), rows()
    before = network(x)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), network)
    layers = add_sara(network, threshold=2e-2)
    assert list(layers) == ["0.weight", "2.weight"]  # the names that the weights have without PEFT
    assert torch.equal(network(x), before)
    train(network, x, steps=2)
    assert not torch.equal(network(x), before)
    remove_sara(network)
    assert torch.equal(network(x), before)


def test_refusals():
    with pytest.raises(ValueError, match="threshold=0.1 and num_params=3 both say"):
        add_sara(mlp(), threshold=0.1, num_params=3)
    with pytest.raises(ValueError, match="threshold=1e-12 selects nothing: the smallest entry of the weights is"):
        add_sara(mlp(16), threshold=1e-12)
    with pytest.raises(ValueError, match="threshold=10 selects everything: the largest entry of the weights is"):
        add_sara(mlp(16), threshold=10)
    with pytest.raises(ValueError, match="threshold=10 selects everything"):
        add_sara(mlp(16), threshold=10, target_modules=["0"])
    for count in (0, 512, 10_000):
        with pytest.raises(ValueError, match=f"num_params={count}: accepted are 1 to 511, of 512 entries"):
            add_sara(mlp(16), num_params=count)
    with pytest.raises(ValueError, match="num_params=1200 selects everything: there are 1152 entries beside"):
        add_sara(Shared(), num_params=1200)
    ties = mlp(16)
    with torch.no_grad():
        ties[0].weight[:3] = 0
    with pytest.raises(
        ValueError, match=r"num_params=47 selects nothing: 48 entries tie for the smallest, \|w\| = 0; acc"
    ):
        add_sara(ties, num_params=47)
    assert sum(len(sara.index) for sara in add_sara(ties, num_params=48).values()) == 48
    with pytest.raises(ValueError, match="target_modules='qkv' matches no layer of Sequential; its layers end in 0, 2"):
        add_sara(mlp(16), target_modules=["qkv"])
    with pytest.raises(ValueError, match="exclude_modules='qkv' matches no layer"):
        add_sara(mlp(16), exclude_modules=["qkv"])
    network = mlp(16)
    add_sara(network, threshold=2e-2)
    with pytest.raises(ValueError, match=r"Sequential has a SaRA already; remove_sara\(network\)"):
        add_sara(network, threshold=2e-2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_may_be_channels_last(when):
    """The places are those of the flattened weight, whatever its layout is."""
    networks, x = [], torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for last in (False, True):
        torch.manual_seed(0)
        network = nn.Conv2d(4, 8, 3, dtype=torch.float64)
        if last and when == "before":
            network.to(memory_format=torch.channels_last)
        add_sara(network, threshold=5e-2)
        if last and when == "after":
            network.to(memory_format=torch.channels_last)
        base = network(x)
        train(network, x)
        with switched_off(network):
            assert torch.equal(network(x), base)
        assert not torch.equal(network(x), base)
        assert network.weight.is_contiguous() != last
        networks.append(network)
    plain, last = networks
    torch.testing.assert_close(last.weight, plain.weight, rtol=0, atol=1e-9)
    (a,), (b,) = (list(sara_layers(n).values()) for n in networks)
    assert torch.equal(a.index, b.index) and a.hashes == b.hashes
    merged = last.weight.detach().clone()
    merge_sara(last)
    assert torch.equal(last.weight, merged) and not last.weight.is_contiguous()
    remove_sara(plain)
    torch.manual_seed(0)
    assert torch.equal(plain.weight, nn.Conv2d(4, 8, 3, dtype=torch.float64).weight)
