import pytest
import torch

from genkit.eval.inputs import read_images
from genkit.eval.intervals import intervals
from genkit.eval.metrics.base import FeatureSet, get_metric
from genkit.eval.metrics.inception_score import InceptionScore
from genkit.eval.run import evaluate
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
    got = intervals("contrast", None, pictures(brightness), halves=2000)["contrast"]
    values = brightness.double() / 510
    error = float(values.std(correction=0)) / 20
    assert got.value == pytest.approx(float(values.mean()), rel=1e-12)
    assert got.standard_error == pytest.approx(error, rel=0.06)
    assert got.low == pytest.approx(got.value - 1.96 * error, abs=0.15 * error)
    assert got.high == pytest.approx(got.value + 1.96 * error, abs=0.15 * error)
    wider = intervals("contrast", None, pictures(brightness), level=0.99)["contrast"]
    assert wider.low < got.low and wider.high > got.high


def hits(metric, name, reference, draw, truth, repetitions, **settings):
    """How many intervals hold the truth; all hold their value."""
    found = 0
    for seed in range(repetitions):
        got = intervals(metric, reference, draw(seed), **settings)[name]
        assert got.low <= got.value <= got.high
        found += got.low <= truth <= got.high
    return found


def binomial(repetitions, share):
    """What all but one in ten thousand binomial numbers lie between."""
    from scipy.stats import binom

    return binom.ppf(5e-5, repetitions, share), binom.ppf(1 - 5e-5, repetitions, share)


def test_of_a_mean_covers_as_often_as_it_says():
    def draw(seed):
        return pictures(torch.randint(0, 201, (60,), generator=torch.Generator().manual_seed(seed)))

    for level in (0.9, 0.95):
        found = hits("contrast", "contrast", None, draw, 100 / 510, 300, level=level, halves=100)
        low, high = binomial(300, level)
        assert low <= found <= high


# The second share is the least that it may truly cover. The distributions are skewed, and recall is a count of
# neighbours, whose variance does not fall exactly as 1 / n: neither covers 95 % at such n.
SETS = [
    ("kid:subsets=0", "kid", 0.92),
    ("cmmd:sigma=1,unbiased=True", "cmmd", 0.92),
    ("frechet", "frechet_distance", 0.93),
    ("prdc", "recall", 0.88),
]


def check_coverage(metric, name, share, repetitions, halves, n):
    """Against the mean of the value over other draws: its expectation with this n, the bias included."""
    metric, reference = get_metric(metric), side(normal(200, 4, 10**6))

    def draw(seed):
        return side(1.1 * normal(n, 4, seed) + 0.4)

    truth = sum(metric(reference, draw(10**5 + seed))[name] for seed in range(300)) / 300
    assert hits(metric, name, reference, draw, truth, repetitions, halves=halves) >= binomial(repetitions, share)[0]


@pytest.mark.parametrize(("metric", "name", "share"), SETS)
def test_of_sets_holds_its_expectation_with_this_n(metric, name, share):
    check_coverage(metric, name, share, repetitions=30, halves=60, n=160)


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "name", "share"), SETS)
def test_of_sets_holds_its_expectation_with_this_n_in_many_repetitions(metric, name, share):
    check_coverage(metric, name, share, repetitions=300, halves=100, n=200)


def test_where_two_sets_are_of_one_law_it_is_wide_and_about_the_value():
    # FD is then its bias, about (2d + d(d+1)/2) / n = 0.52: it is what the interval is about, not the truth 0.
    got = intervals("frechet", side(normal(100, 8)), side(normal(100, 8, 1)), both=True)["frechet_distance"]
    assert got.value == pytest.approx(0.52, rel=0.4) and 0 < got.low < got.value < got.high
    values = [
        get_metric("frechet")(side(normal(100, 8, 2 * i)), side(normal(100, 8, 2 * i + 1)))["frechet_distance"]
        for i in range(50)
    ]
    spread = torch.tensor(values).std().item()
    assert spread < got.standard_error < 3 * spread


def test_pairs_stay_together():
    x, y = torch.zeros(30, 1, 1, 2, dtype=torch.uint8), torch.zeros(30, 1, 1, 2, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(30)
    y[:, 0, 0, 0] = torch.arange(30) + 51
    sides = [FeatureSet(FeatureStats(0), images=read_images(images)) for images in (x, y)]
    got = intervals("psnr", *sides)["psnr"]
    assert got.standard_error < 1e-9 and got.low == pytest.approx(got.high)  # every pair has the same error
    with pytest.raises(ValueError, match="both=True: 'psnr' has pairs"):
        intervals("psnr", *sides, both=True)


def test_without_a_reference():
    x = normal(80, 4)
    one = FeatureSet(FeatureStats(4).update(x), x, 3 * x)
    got = intervals(InceptionScore(splits=2), None, one, halves=20)
    assert got["inception_score"].low < got["inception_score"].high
    with pytest.raises(ValueError, match="has no reference"):
        intervals(InceptionScore(splits=2), None, one, both=True)


def test_repeats_itself_and_follows_the_seed():
    sides = side(normal(50, 3)), side(normal(40, 3, 1))
    runs = [intervals("frechet", *sides, halves=10, seed=s) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_of_neighbours_and_of_kid_at_the_size_of_its_subsets():
    sides = side(normal(50, 3)), side(normal(40, 3, 1))
    assert set(intervals("prdc", *sides, halves=5)) == {"precision", "recall", "density", "coverage"}
    assert set(intervals("kid:subset_size=40,subsets=3", *sides, halves=5)) == {"kid"}  # a half has 20 rows


def test_odd_and_few_rows():
    values = torch.tensor([0, 50, 100, 200, 255])
    got = intervals("contrast", None, pictures(values), halves=2000)["contrast"]
    error = float((values.double() / 510).std()) / 5**0.5
    assert got.standard_error == pytest.approx(error * (3 / 2) ** 0.5, rel=0.06)  # halves of two: (1/2 - 1/5) / (1/5)
    with pytest.raises(ValueError, match="the generated set has n=3: an interval from halves needs at least 4"):
        intervals("contrast", None, pictures(values[:3]))
    with pytest.raises(ValueError, match="the reference set has n=3"):
        intervals("frechet", side(normal(3, 2)), side(normal(9, 2)), both=True)


def test_of_a_model_there_is_none():
    with pytest.raises(ValueError, match="'straightness' is of the model that makes the images"):
        intervals("straightness", None, side(normal(9, 2)))


@pytest.mark.filterwarnings("error")
def test_evaluate_says_why_there_is_none_and_warns_of_nothing_that_it_notes():
    images = torch.randint(0, 17, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0)).mul(15).to(torch.uint8)
    found = evaluate(images[:25], images[25:], metrics=["prdc:pr_k=8", "frechet"], intervals=5, quiet=True)
    assert set(found.intervals) == {"frechet_distance", "frechet_raw"}
    assert any(note.startswith("no interval of 'prdc': ") and "at least 9" in note for note in found.notes)
    assert sum("fewer images" in note for note in found.notes) == 2
    found = evaluate(images[:25], images[25:], metrics=["contrast"], intervals=5, quiet=True)
    assert found.notes == [] and set(found.intervals) == {"contrast"}


def test_errors():
    sides = side(normal(50, 3)), side(normal(40, 3, 1))
    with pytest.raises(ValueError, match="level=95"):
        intervals("frechet", *sides, level=95)
    with pytest.raises(ValueError, match="halves=1: expected at least 2"):
        intervals("frechet", *sides, halves=1)
    with pytest.raises(ValueError, match="keep=True"):
        intervals("frechet", sides[0], FeatureSet(sides[1].stats))
