import pytest
import torch

from genkit.eval.metrics.base import FeatureSet, get_metric
from genkit.eval.metrics.kid import KernelInceptionDistance, kid, kid_subsets
from genkit.eval.statistics import FeatureStats


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(d, a, s, b, r):
    """KID of N(a, s I) and N(b, r I) in closed form: moments of p = x.y up to the third."""

    def kernel(mean_product, s, norm_a, r, norm_b):
        variance = s * norm_b + r * norm_a + s * r * d
        second = variance + mean_product**2
        third = 6 * s * r * mean_product + 3 * variance * mean_product + mean_product**3
        return 1 + 3 * mean_product / d + 3 * second / d**2 + third / d**3

    aa, bb, ab = float(a @ a), float(b @ b), float(a @ b)
    return kernel(aa, s, aa, s, aa) + kernel(bb, r, bb, r, bb) - 2 * kernel(ab, s, aa, r, bb)


def test_expectation_in_closed_form():
    # d = 32, a = 0, s = 1, b = 0.2, r = 1.21: 0.136770; the mean of 200 values at n = 400 was 0.1377 +- 0.0014.
    d = 32
    a, b = torch.zeros(d, dtype=torch.float64), torch.full((d,), 0.2, dtype=torch.float64)
    want = expected(d, a, 1.0, b, 1.21)
    assert want == pytest.approx(0.136770, abs=5e-7)
    values = [kid(normal(400, d, 2 * i), 0.2 + 1.1 * normal(400, d, 2 * i + 1)) for i in range(100)]
    assert sum(values) / 100 == pytest.approx(want, abs=0.006)  # three standard errors


def test_definition():
    x, y = normal(7, 3), normal(5, 3, 1) + 0.5

    def k(p, q):
        return (float(p @ q) / 3 + 1) ** 3

    own = [
        sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    cross = sum(k(p, q) for p in x for q in y) / 35
    assert kid(x, y) == pytest.approx(sum(own) - 2 * cross, rel=1e-12)


def test_blocks_change_nothing():
    from genkit.eval.metrics import _mmd

    x, y = normal(50, 4), normal(41, 4, 1)
    whole = [_mmd.squared_mmd(x, y, lambda a, b: a @ b.T, unbiased=u) for u in (True, False)]
    parts = [_mmd.squared_mmd(x, y, lambda a, b: a @ b.T, unbiased=u, block=7) for u in (True, False)]
    assert parts == pytest.approx(whole, rel=1e-12)


def test_order_rotation_and_exchange_change_nothing():
    x, y = normal(90, 6), normal(80, 6, 1) + 0.3
    q = torch.linalg.qr(normal(6, 6, 2)).Q
    for other in (kid(y, x), kid(x.flip(0), y), kid(x @ q, y @ q)):
        assert other == pytest.approx(kid(x, y), rel=1e-10)


def test_no_bias_and_no_clamp():
    values = [kid(normal(60, 8, 2 * i), normal(60, 8, 2 * i + 1)) for i in range(60)]
    assert min(values) < 0 < max(values)
    assert abs(sum(values)) / 60 < 0.03


def test_subsets():
    x, y = normal(300, 8), normal(250, 8, 1) + 0.2
    got = kid_subsets(x, y, subsets=60, subset_size=100)
    assert got.mean == pytest.approx(kid(x, y), abs=4 * got.standard_error)
    assert got.standard_error == pytest.approx(got.std / 60**0.5)
    whole = kid_subsets(x[:250], y, subsets=3, subset_size=250)  # every subset is the set
    assert whole.mean == pytest.approx(kid(x[:250], y), rel=1e-10) and whole.std < 1e-12
    assert kid_subsets(x, y, subsets=2, subset_size=9) != kid_subsets(x, y, subsets=2, subset_size=9, seed=1)


def test_against_torchmetrics():
    kid_module = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(200, 16), normal(220, 16, 1) + 0.3
    ours, theirs = kid(x[:200], y[:200]), float(kid_module.poly_mmd(x[:200], y[:200]))
    assert ours == pytest.approx(theirs, rel=1e-10)


def test_against_clean_fid():
    fid = pytest.importorskip("cleanfid.fid")
    x, y = normal(150, 16), normal(150, 16, 1) + 0.3
    assert kid(x, y) == pytest.approx(fid.kernel_distance(x.numpy(), y.numpy(), num_subsets=1), rel=1e-10)


def test_errors():
    x = normal(30, 3)
    with pytest.raises(ValueError, match="generated set: 1 features, but KID needs at least 2"):
        kid(x, x[:1])
    with pytest.raises(
        ValueError, match="reference set: 30 features, but KID with subset_size=1000 needs at least 1000"
    ):
        kid_subsets(x, x)
    with pytest.raises(ValueError, match="subsets=1"):
        kid_subsets(x, x, subsets=1, subset_size=5)
    with pytest.raises(ValueError, match="3 feature dimensions, the generated set 4"):
        kid(x, normal(30, 4))


def test_metric():
    x, y = normal(60, 3), normal(50, 3, 1)
    sets = [FeatureSet(FeatureStats(3).update(rows), rows) for rows in (x, y)]
    values = KernelInceptionDistance(subsets=5, subset_size=20)(*sets)
    assert values["kid"] == kid(x, y)
    assert values["kid_subsets_mean"] == kid_subsets(x, y, subsets=5, subset_size=20).mean
    assert set(values) == {"kid", "kid_subsets_mean", "kid_subsets_std", "kid_subsets_standard_error"}


def test_without_subsets():
    x, y = FeatureSet(FeatureStats(3), torch.randn(9, 3)), FeatureSet(FeatureStats(3), torch.randn(8, 3))
    assert get_metric("kid:subsets=0")(x, y) == {"kid": kid(x.features, y.features)}
    with pytest.raises(ValueError, match="subsets=0: subset_size=5 and seed=0 have no effect"):
        get_metric("kid:subsets=0,subset_size=5")
