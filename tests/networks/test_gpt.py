"""The decoder: sizes, rotary positions, cache, untrained loss."""

import math

import pytest
import torch

from genkit.networks.gpt import GPT, rotary_table, rotate

SMALL = dict(vocab_size=5, sample_size=3, num_classes=2, hidden_size=16, num_layers=2, num_heads=2)


def small(**changes):
    torch.manual_seed(0)
    network = GPT(**SMALL | changes)
    torch.nn.init.normal_(network.out.weight, std=0.5)
    return network.eval()


@pytest.mark.parametrize(
    "layers, hidden, heads, millions",
    [
        (12, 768, 12, 110.89),
        (24, 1024, 16, 342.91),
        (36, 1280, 20, 774.70),
        (48, 1536, 24, 1410.97),
        (24, 3200, 32, 3096.66),
    ],
    ids=["B", "L", "XL", "XXL", "3B"],
)
def test_published_sizes(layers, hidden, heads, millions):
    with torch.device("meta"):
        network = GPT(16384, 16, 1000, hidden, layers, heads)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("vocab, loss", [(16384, 9.704061), (262144, 12.476649), (17, math.log(17))])
def test_untrained_loss(vocab, loss):
    network = GPT(vocab, 2, 10, 16, 1, 2)
    tokens = torch.randint(vocab, (3, 4))
    logits = network(tokens[:, :-1], torch.tensor([0, 1, 10]))
    assert torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item() == pytest.approx(
        loss, abs=1e-6
    )


def test_a_score_depends_on_the_distance_of_two_cells_alone():
    grid, dim = 5, 16
    cos, sin = rotary_table(grid, dim)
    q, k = torch.randn(2, 1, 1, 1, dim, dtype=torch.float64)
    turned = [rotate(v.expand(1, 1, 26, dim), cos, sin)[0, 0] for v in (q, k)]
    assert not turned[0][0].any() and not turned[1][0].any()  # the class position
    torch.testing.assert_close(turned[0][1:].norm(dim=1), q.norm().expand(25), rtol=1e-6, atol=0)
    scores = (turned[0][1:] @ turned[1][1:].T).view(grid, grid, grid, grid)
    for dr in range(-2, 3):
        for dc in range(-2, 3):
            same = [
                scores[r, c, r + dr, c + dc]
                for r in range(grid)
                for c in range(grid)
                if 0 <= r + dr < grid and 0 <= c + dc < grid
            ]
            assert torch.stack(same).std() < 1e-4
    assert scores.std() > 0.1


def test_tokens_see_those_before_them_alone():
    network, labels = small(), torch.tensor([1])
    tokens = torch.randint(5, (1, 8))
    other = tokens.clone()
    other[0, 4] = (other[0, 4] + 1) % 5
    a, b = network(tokens, labels), network(other, labels)
    assert a.shape == (1, 9, 5)
    assert torch.equal(a[:, :5], b[:, :5]) and (a[:, 5:] != b[:, 5:]).any(-1).all()
    assert (network(tokens, torch.tensor([0])) != a).any(-1).all()  # the class reaches every position


@pytest.mark.parametrize("parts", [[1] * 8, [3, 1, 4], [0, 8]])
def test_the_cache_gives_what_a_full_pass_gives(parts):
    network, labels = small(), torch.tensor([0, 2])
    tokens = torch.randint(5, (2, 8))
    full, cache, got, start = network(tokens, labels), [], [], 0
    for i, n in enumerate(parts):
        got.append(network(tokens[:, start : start + n], None if i else labels, cache))
        start += n
    torch.testing.assert_close(torch.cat(got, dim=1), full, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    network, labels = small().train(), torch.tensor([0, 2])
    network.requires_grad_()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    grads = []
    for on in (False, True):
        network.enable_gradient_checkpointing() if on else network.disable_gradient_checkpointing()
        network.zero_grad()
        network(torch.randint(5, (2, 8), generator=torch.Generator().manual_seed(1)), labels).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-7)


def test_bad_input():
    with pytest.raises(ValueError, match="hidden_size=18 is not a multiple of 4 num_heads=8"):
        GPT(**SMALL | dict(hidden_size=18))
    for name in ("vocab_size", "sample_size", "num_classes", "hidden_size", "num_layers", "num_heads"):
        with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
            GPT(**SMALL | {name: 0})
    with pytest.raises(ValueError, match="vocab_size='many': must be an integer"):
        GPT(**SMALL | {"vocab_size": "many"})
    network, cache = small(), []
    with pytest.raises(ValueError, match=r"tokens \(1, 10\) after 0 positions: the grid has 9 tokens in all"):
        network(torch.zeros(1, 10).long(), torch.tensor([0]))
    with pytest.raises(ValueError, match="class_labels are the first position"):
        network(torch.zeros(1, 2).long())
    network(torch.zeros(1, 2).long(), torch.tensor([0]), cache)
    with pytest.raises(ValueError, match="the cache holds 3 positions"):
        network(torch.zeros(1, 1).long(), torch.tensor([0]), cache)
    with pytest.raises(ValueError, match=r"tokens \(1, 8\) after 3 positions: the grid has 9 tokens in all"):
        network(torch.zeros(1, 8).long(), None, cache)
