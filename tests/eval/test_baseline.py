import pytest
import torch

from genkit.eval.baseline import real_halves
from genkit.eval.metrics.base import FeatureSet
from genkit.eval.statistics import FeatureStats


def features(n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return FeatureSet(FeatureStats(d).update(x), x)


def test_distance_of_halves_is_the_sample_size_bias():
    # (2d + d(d+1)/2) / (n/2) = 0.0376 for d = 8, n = 2766
    n, d = 2766, 8
    mean, std = real_halves(features(n, d), splits=6)["frechet_distance"]
    assert mean == pytest.approx((2 * d + d * (d + 1) / 2) / (n / 2), rel=0.25) and 0 < std < mean


def test_repeatable_and_seeded():
    real = features(50, 3)
    a, b, c = (real_halves(real, ["prdc", "frechet"], splits=2, seed=s) for s in (0, 0, 1))
    assert a == b and a != c and {"coverage", "frechet_distance"} <= set(a)


def test_errors():
    with pytest.raises(ValueError, match="splits=1"):
        real_halves(features(50, 3), splits=1)
    with pytest.raises(ValueError, match="n=3"):
        real_halves(features(3, 2))
    with pytest.raises(ValueError, match="keep=True"):
        real_halves(FeatureSet(features(50, 3).stats))
