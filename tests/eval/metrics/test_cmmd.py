import math

import pytest
import torch

from genkit.eval.metrics.cmmd import cmmd


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("unbiased", [False, True])
def test_definition(unbiased):
    x, y, sigma = normal(9, 4), normal(7, 4, 1) + 1, 0.7

    def k(p, q):
        return torch.exp(-(p - q).square().sum() / (2 * sigma**2)).item()

    def own(z):
        pairs = [k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j or not unbiased]
        return sum(pairs) / len(pairs)

    u, v = unit(x), unit(y)
    want = 1000 * (own(u) + own(v) - 2 * sum(k(p, q) for p in u for q in v) / 63)
    assert cmmd(x, y, sigma=sigma, unbiased=unbiased) == pytest.approx(want, rel=1e-11)


def test_lengths_do_not_matter():
    x, y = normal(20, 5), normal(20, 5, 1)
    assert cmmd(3 * x, y) == pytest.approx(cmmd(unit(x), unit(y)), rel=1e-10)


def test_bias_for_one_law():
    # 1000 * 2/n (1 - E k); two random directions are at a squared distance of about 2, so E k is exp(-1/100).
    n, excess, unbiased = 200, [], []
    for i in range(20):
        x, y = normal(n, 32, 2 * i), normal(n, 32, 2 * i + 1)
        unbiased.append(cmmd(x, y, unbiased=True))
        excess.append(cmmd(x, y) - unbiased[-1])
    assert sum(excess) / 20 == pytest.approx(2000 / n * (1 - math.exp(-1 / 100)), rel=2e-3)
    assert min(unbiased) < 0 and abs(sum(unbiased)) / 20 < 0.01


def test_rotation_and_exchange_change_nothing():
    x, y = normal(90, 6), normal(80, 6, 1) + 0.3
    q = torch.linalg.qr(normal(6, 6, 2)).Q
    assert cmmd(y, x) == pytest.approx(cmmd(x, y), rel=1e-9)
    assert cmmd(x @ q, y @ q) == pytest.approx(cmmd(x, y), rel=1e-9)


def test_errors():
    x = normal(6, 3)
    with pytest.raises(ValueError, match="sigma=0"):
        cmmd(x, x, sigma=0)
    with pytest.raises(ValueError, match="CMMD needs at least 2"):
        cmmd(x[:1], x, unbiased=True)
    y = x.clone()
    y[4] = 0
    with pytest.raises(ValueError, match="generated set: feature row 4 is zero"):
        cmmd(x, y)
    y[4, 0] = float("inf")
    with pytest.raises(ValueError, match="generated set: feature row 4 is not finite"):
        cmmd(x, y)
