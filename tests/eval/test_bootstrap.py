import pytest
import torch

from genkit.eval.bootstrap import bootstrap
from genkit.eval.inputs import read_images
from genkit.eval.metrics.base import FeatureSet
from genkit.eval.metrics.inception_score import InceptionScore
from genkit.eval.statistics import FeatureStats


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def side(x):
    return FeatureSet(FeatureStats(x.shape[1]).update(x), x)


def pictures(values):
    """One-pixel pictures, half black and half of a brightness: their contrast is half of it."""
    images = torch.zeros(len(values), 1, 1, 2, dtype=torch.uint8)
    images[:, 0, 0, 1] = torch.as_tensor(values)
    return FeatureSet(FeatureStats(0), images=read_images(images))


def test_of_a_mean_is_the_textbook_interval():
    brightness = torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(0))
    got = bootstrap("contrast", None, pictures(brightness), resamples=2000)["contrast"]
    values = brightness.double() / 510
    error = float(values.std(correction=0)) / 20
    assert got.value == pytest.approx(float(values.mean()), rel=1e-12)
    assert got.standard_error == pytest.approx(error, rel=0.06)
    assert got.low == pytest.approx(got.value - 1.96 * error, abs=0.15 * error)
    assert got.high == pytest.approx(got.value + 1.96 * error, abs=0.15 * error)
    wider = bootstrap("contrast", None, pictures(brightness), level=0.99)["contrast"]
    assert wider.low < got.low and wider.high > got.high


def test_it_covers_as_often_as_it_says():
    hits = 0
    for seed in range(100):
        drawn = torch.randint(0, 201, (60,), generator=torch.Generator().manual_seed(seed))
        got = bootstrap("contrast", None, pictures(drawn), level=0.9, resamples=100)["contrast"]
        hits += got.low <= 100 / 510 <= got.high
    assert 80 <= hits <= 97


def test_takes_the_bias_of_a_frechet_distance_off():
    # Of one law: FD is its bias, (2d + d(d+1)/2) / n = 0.52, the truth 0. The interval lies below the value.
    got = bootstrap("frechet", side(normal(100, 8)), side(normal(100, 8, 1)), both=True, resamples=60)[
        "frechet_distance"
    ]
    assert got.value == pytest.approx(0.52, rel=0.4)
    assert got.high < got.value and abs(got.low + got.high) / 2 < 0.2


def test_pairs_stay_together():
    x, y = torch.zeros(30, 1, 1, 2, dtype=torch.uint8), torch.zeros(30, 1, 1, 2, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(30)
    y[:, 0, 0, 0] = torch.arange(30) + 51
    sides = [FeatureSet(FeatureStats(0), images=read_images(images)) for images in (x, y)]
    got = bootstrap("psnr", *sides)["psnr"]
    assert got.standard_error < 1e-9 and got.low == pytest.approx(got.high)  # every pair has the same error
    with pytest.raises(ValueError, match="both=True: 'psnr' has pairs"):
        bootstrap("psnr", *sides, both=True)


def test_without_a_reference():
    x = normal(80, 4)
    one = FeatureSet(FeatureStats(4).update(x), x, 3 * x)
    got = bootstrap(InceptionScore(splits=2), None, one, resamples=20)
    assert got["inception_score"].low < got["inception_score"].high
    with pytest.raises(ValueError, match="has no reference"):
        bootstrap(InceptionScore(splits=2), None, one, both=True)


def test_repeats_itself_and_follows_the_seed():
    sides = side(normal(50, 3)), side(normal(40, 3, 1))
    runs = [bootstrap("frechet", *sides, resamples=10, seed=s) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_errors():
    sides = side(normal(50, 3)), side(normal(40, 3, 1))
    with pytest.raises(ValueError, match="'prdc' looks at nearest neighbours"):
        bootstrap("prdc", *sides)
    with pytest.raises(ValueError, match="level=95"):
        bootstrap("frechet", *sides, level=95)
    with pytest.raises(ValueError, match="resamples=1"):
        bootstrap("frechet", *sides, resamples=1)
    with pytest.raises(ValueError, match="keep=True"):
        bootstrap("frechet", sides[0], FeatureSet(sides[1].stats))
