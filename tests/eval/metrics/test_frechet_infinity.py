import pytest
import torch

from genkit.eval.metrics.base import FeatureSet
from genkit.eval.metrics.frechet import frechet_distance
from genkit.eval.metrics.frechet_infinity import FrechetInfinity, frechet_infinity
from genkit.eval.statistics import FeatureStats


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mean_shift_of_normal_sets():
    # d = 64, the truth is 0.0512, n = 20000: FD 0.165 on average; from the generated side 0.107, whose excess is the
    # bias of the reference, (d + d(d+1)/4) / n = 0.055; from both 0.053, single runs 0.036 to 0.069. The noise of one
    # pair, 0.0045, is common to all three, so their differences are surer than they are.
    d, n = 64, 20_000
    x, y = normal(n, d), normal(n, d, 1) + (0.0512 / d) ** 0.5
    one, two = frechet_infinity(x, y), frechet_infinity(x, y, both=True)
    all_of_it, half = frechet_distance(x, y), (d + d * (d + 1) / 4) / n
    assert all_of_it == pytest.approx(0.165, abs=0.0135)
    assert one.intercept == pytest.approx(0.107, abs=0.0135)
    assert all_of_it - one.intercept == pytest.approx(half, abs=0.008)
    assert all_of_it - two.intercept == pytest.approx(2 * half, abs=0.012)
    assert 0.036 <= two.intercept <= 0.069
    # The slope is the bias per sample: half of (2d + d(d+1)/2) from one side, all of it from both.
    assert one.slope == pytest.approx(d + d * (d + 1) / 4, rel=0.06)
    assert two.slope == pytest.approx(2 * d + d * (d + 1) / 2, rel=0.06)


def test_points_on_a_line_are_met(monkeypatch):
    import genkit.eval.metrics.frechet_infinity as module

    seen = []

    def line(x, y):
        seen.append(len(y))
        return 3 + 40 / len(y)

    monkeypatch.setattr(module, "frechet_raw", line)
    fit = frechet_infinity(normal(50, 2), normal(100, 2), sizes=5, smallest=20)
    assert seen == [20, 40, 60, 80, 100]
    assert fit == pytest.approx((3, 40, 0), abs=1e-9)


def test_statistics_are_a_reference_for_one_side_only():
    x, y = normal(200, 4), normal(150, 4, 1)
    stats = FeatureStats(4).update(x)
    assert frechet_infinity(stats, y) == frechet_infinity(x, y)
    with pytest.raises(ValueError, match="both=True draws from the reference"):
        frechet_infinity(stats, y, both=True)


def test_subsets_follow_the_seed():
    x, y = normal(200, 4), normal(150, 4, 1)
    assert frechet_infinity(x, y, seed=1) == frechet_infinity(x, y, seed=1) != frechet_infinity(x, y, seed=2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sizes": 1}, "sizes=1"),
        ({"smallest": 1}, "smallest=1: expected 2 to 26"),
        ({"smallest": 30}, "40 features, but FID-infinity with sizes=15, smallest=30 needs at least 44"),
        ({"sizes": 50}, "needs at least 51"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        frechet_infinity(normal(90, 3), normal(40, 3), **settings)


def test_metric():
    x, y = normal(60, 3), normal(60, 3, 1)
    sets = [FeatureSet(FeatureStats(3).update(rows), rows) for rows in (x, y)]
    one, two = FrechetInfinity(sizes=4), FrechetInfinity(both=True, sizes=4)
    assert one(*sets)["frechet_infinity"] == frechet_infinity(x, y, sizes=4).intercept
    assert two(*sets)["frechet_infinity"] == frechet_infinity(x, y, sizes=4, both=True).intercept
    assert one.settings == {"both": False, "sizes": 4, "smallest": None, "seed": 0}
    assert not one.missing({"stats"}, {"features"})
    assert two.missing({"stats"}, {"features"}) == ["reference features"]
