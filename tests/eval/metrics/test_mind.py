import pytest
import torch

from genkit.eval.metrics.mind import mind


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_shift_and_a_scale():
    # d = 32: a shift c gives 3 |c|^2 = 24, the scale 2 gives 3 d = 96, within 5 % with 1000 directions.
    x = normal(4000, 32)
    c = torch.full((32,), 0.5, dtype=torch.float64)
    assert mind(x, x + c) == pytest.approx(24, rel=0.05)
    assert mind(x, 2 * normal(4000, 32, 1)) == pytest.approx(96, rel=0.05)


def test_one_law():
    # Positive, and falling with n: 0.65 at n = 1000, 0.13 at n = 5000 with d = 32.
    assert mind(normal(1000, 32), normal(1000, 32, 1)) == pytest.approx(0.65, rel=0.15)
    assert mind(normal(5000, 32), normal(5000, 32, 1)) == pytest.approx(0.13, rel=0.15)
    assert mind(normal(50, 3), normal(50, 3).flip(0)) < 1e-25


def test_one_dimension_is_the_transport_of_sorted_values():
    x, y = normal(40, 1), normal(40, 1, 1) * 2
    want = 3 * (x[:, 0].sort().values - y[:, 0].sort().values).square().mean()
    assert mind(x, y, directions=3) == pytest.approx(float(want), rel=1e-12)


def test_exchange_and_unequal_sizes():
    x, y = normal(300, 4), normal(200, 4, 1) + 1
    assert mind(x[:200], y) == pytest.approx(mind(y, x[:200]), rel=1e-12)
    assert mind(x, y) == pytest.approx(12, rel=0.3)
    assert mind(x, y) == mind(x, y) != mind(x, y, seed=1)


def test_errors():
    x = normal(6, 3)
    with pytest.raises(ValueError, match="MIND needs at least 2"):
        mind(x, x[:1])
    with pytest.raises(ValueError, match="directions=0"):
        mind(x, x, directions=0)
