import pytest
import torch

from genkit.eval.metrics.prdc import prdc


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(x, y, pr_k=3, dc_k=5):
    """Straight from the formulas, one pair at a time."""

    def radius(z, i, k):
        return sorted(float((z[i] - z[j]).norm()) for j in range(len(z)) if j != i)[k - 1]

    d = [[float((a - b).norm()) for b in y] for a in x]
    x3, x5 = [radius(x, i, pr_k) for i in range(len(x))], [radius(x, i, dc_k) for i in range(len(x))]
    y3 = [radius(y, j, pr_k) for j in range(len(y))]
    n, m = len(x), len(y)
    return (
        sum(any(d[i][j] <= x3[i] for i in range(n)) for j in range(m)) / m,
        sum(any(d[i][j] <= y3[j] for j in range(m)) for i in range(n)) / n,
        sum(d[i][j] < x5[i] for i in range(n) for j in range(m)) / (dc_k * m),
        sum(min(d[i]) < x5[i] for i in range(n)) / n,
    )


@pytest.mark.parametrize("block", [7, 1024])
def test_definition(block):
    x, y = normal(40, 3), 1.3 * normal(31, 3, 1) + 0.4
    values = prdc(x, y, block=block)
    assert tuple(values) == pytest.approx(by_definition(x, y), abs=1e-14)
    assert 0.1 < values.recall < 1 and values.precision < 1


def test_expectation_for_one_law():
    # Coverage 1 - prod_{i<5} (N - i) / (2N - 1 - i) = 0.968828 at N = 1000; density 1.
    expected = 1.0
    for i in range(5):
        expected *= (1000 - i) / (1999 - i)
    assert 1 - expected == pytest.approx(0.968828, abs=5e-7)
    runs = [prdc(normal(1000, 16, 2 * s), normal(1000, 16, 2 * s + 1)) for s in range(4)]
    assert sum(r.coverage for r in runs) / 4 == pytest.approx(0.968828, abs=0.006)
    assert sum(r.density for r in runs) / 4 == pytest.approx(1, abs=0.04)


def test_precision_is_recall_with_the_sets_exchanged():
    x, y = normal(120, 6), 0.7 * normal(90, 6, 1)
    a, b = prdc(x, y), prdc(y, x)
    assert a.precision == b.recall and a.recall == b.precision and a.precision != a.recall


def test_rotation_and_order_change_nothing():
    x, y = normal(150, 8), normal(130, 8, 1) + 0.3
    q = torch.linalg.qr(normal(8, 8, 2)).Q
    assert prdc(x @ q, y @ q) == pytest.approx(prdc(x, y), abs=1e-12)
    assert prdc(x.flip(0), y.flip(0)) == pytest.approx(prdc(x, y), abs=1e-12)


def test_extremes():
    x = normal(60, 4)
    assert prdc(x, x).precision == prdc(x, x).recall == prdc(x, x).coverage == 1
    assert prdc(x, x + 1e3) == (0, 0, 0, 0)


def test_duplicates_decide_between_less_and_less_or_equal():
    # All points coincide: radii are 0; <= counts a coincident point (P, R), < does not (D, C).
    x = torch.ones(10, 3)
    assert prdc(x, x) == (1, 1, 0, 0)


def test_near_duplicates_far_from_the_origin_keep_their_order():
    # |x|^2 + |y|^2 - 2 x.y in float32 would see only noise at this offset.
    x = normal(80, 4) * 1e-3
    assert prdc(x + 1e4, 1.5 * x.flip(1) + 1e4) == pytest.approx(prdc(x, 1.5 * x.flip(1)), abs=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="reference set: 5 features, but k=5 needs at least 6"):
        prdc(normal(5, 3), normal(9, 3))
    with pytest.raises(ValueError, match="3 feature dimensions, the generated set 4"):
        prdc(normal(9, 3), normal(9, 4))
    y = normal(9, 3)
    y[4, 0] = float("nan")
    with pytest.raises(ValueError, match="generated set: feature row 4"):
        prdc(normal(9, 3), y)
    with pytest.raises(ValueError, match="pr_k=0"):
        prdc(normal(9, 3), normal(9, 3), pr_k=0)
