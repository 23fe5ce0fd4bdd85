"""The table of docs/evaluation.md: what other libraries make of the same digits."""

import pytest
import torch
from torch.nn import functional as F

from genkit.eval.extractors.base import get_extractor
from genkit.eval.inputs import read_images
from genkit.eval.metrics.frechet import frechet_distance
from genkit.eval.metrics.kid import kid
from genkit.eval.metrics.psnr import psnr
from genkit.eval.metrics.ssim import ssim
from genkit.eval.torchmetrics import FrechetDistance

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, and ours of few rows


@pytest.fixture(scope="module")
def digits():
    images = read_images("digits")
    return images.load(torch.arange(images.n))


@pytest.fixture(scope="module")
def sides(digits):
    with torch.no_grad():
        features = get_extractor("digits")(digits).features
    return features[::2], features[1::2]


class Rows(torch.nn.Module):
    """Features as images, for what takes images."""

    num_features = 128

    def forward(self, images):
        return images.flatten(1)


def both(metric, x, y):
    metric.update(x.view(-1, 1, 8, 16), real=True)
    metric.update(y.view(-1, 1, 8, 16), real=False)
    return metric.compute()


def theirs(x, y, dtype=torch.float64):
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(feature=Rows(), normalize=True)
    return float(both(fid.set_dtype(dtype), x.to(dtype), y.to(dtype)))


def test_frechet_distance_of_the_digits(sides):
    ours = frechet_distance(*sides)
    assert ours == pytest.approx(3.77557, rel=1e-4)
    assert theirs(*sides) == pytest.approx(ours, rel=1e-9)
    assert 1e-5 < abs(theirs(*sides, dtype=torch.float32) / ours - 1) < 1e-3
    assert frechet_distance(*(s[:800] for s in sides)) == pytest.approx(4.23, abs=0.01)
    assert frechet_distance(*(s[:100] for s in sides)) == pytest.approx(60.6, abs=0.1)


def test_few_digits_cost_roots_of_eigenvalues_their_digits(sides):
    few = [s[:60] for s in sides]
    ours = frechet_distance(*few)
    assert ours == pytest.approx(70.8633, rel=1e-4)
    assert 1e-8 < abs(theirs(*few) / ours - 1) < 1e-5


def test_clean_fid_takes_the_mean_in_float32(sides):
    fid = pytest.importorskip("cleanfid.fid")
    x, y = (s.numpy() for s in sides)
    try:
        single, double = fid.fid_from_feats(x, y), fid.fid_from_feats(x.astype("float64"), y.astype("float64"))
    except TypeError as error:  # scipy 1.18, whose square root it calls as it may no longer
        pytest.skip(str(error))
    ours = frechet_distance(*sides)
    assert double == pytest.approx(ours, rel=1e-9)
    assert 1e-9 < abs(single / ours - 1) < 1e-5


def test_kid_of_subsets_is_another_number_each_time(sides):
    module = pytest.importorskip("torchmetrics.image.kid")
    made = [module.KernelInceptionDistance(Rows(), subsets=20, subset_size=800, normalize=True) for _ in range(2)]
    values = [both(metric, *sides)[0] for metric in made]
    ours = kid(*sides)
    assert values[0] != values[1] and ours == pytest.approx(-0.0238, abs=1e-4) and ours == kid(*sides)
    assert all(float(v) == pytest.approx(ours, abs=0.015) for v in values)  # 4 standard errors of the mean of 20


def test_psnr_and_ssim_of_digits(digits):
    module = pytest.importorskip("torchmetrics.functional.image")
    x, y = (F.interpolate(part.float() / 255, 32) for part in (digits[:200], digits[200:400]))
    ours = ssim(x, y, data_range=1).mean(), psnr(x, y, data_range=1).mean()
    assert [float(v) for v in ours] == pytest.approx([0.168, 8.56], abs=5e-3)
    assert float(module.structural_similarity_index_measure(y, x, data_range=1.0)) == pytest.approx(0.283, abs=1e-3)
    assert float(module.peak_signal_noise_ratio(y, x, data_range=1.0)) == pytest.approx(8.24, abs=5e-3)


def test_images_beyond_the_range_wrap_there_and_are_refused_here(digits):
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    seen = []

    class Spy(Rows):
        num_features = 64

        def forward(self, images):
            seen.append(images)
            return images.flatten(1).float()

    fid(feature=Spy(), normalize=True).update(torch.full((2, 1, 8, 8), 1.01), real=True)
    assert int(seen[-1].flatten()[0]) == 1  # 257 of 256
    with pytest.raises(ValueError, match=r"float images are taken in \[0, 1\]"):
        FrechetDistance("digits").update(torch.full((2, 1, 8, 8), 1.01), real=True)
