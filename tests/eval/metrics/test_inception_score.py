import math

import pytest
import torch

from genkit.eval.metrics.inception_score import inception_score
from genkit.rng import hash_seed


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sure_and_even_classes_give_their_number():
    logits = 300 * torch.eye(7, dtype=torch.float64).repeat(20, 1)
    assert inception_score(logits, splits=1) == pytest.approx((7, 0), abs=1e-12)
    assert inception_score(torch.zeros(30, 7)).mean == pytest.approx(1, abs=1e-12)


@pytest.mark.filterwarnings("ignore")  # those of torchmetrics
@pytest.mark.parametrize("height", [200, 2000])
def test_sure_of_one_class_is_one_and_not_nan(height):
    # Where torchmetrics, in float32 and by the logarithm of a mean, gives NaN.
    logits = torch.zeros(100, 10)
    logits[:, 3] = height
    assert inception_score(logits) == pytest.approx((1, 0), abs=1e-12)
    their = pytest.importorskip("torchmetrics.image.inception").InceptionScore(feature=torch.nn.Identity())
    their.features.append(logits)
    assert math.isnan(float(their.compute()[0]))


def test_splits_are_cut_by_integer_division():
    # 21 rows in 10 splits: nine of two rows and one of three. Two sure rows of different classes score 2, three 3.
    logits = 500 * torch.eye(21, dtype=torch.float64)
    score = inception_score(logits, splits=10)
    assert score.mean == pytest.approx((9 * 2 + 3) / 10, rel=1e-12)
    assert score.std == pytest.approx(0.3, rel=1e-12)  # of the splits themselves: divided by 10


@pytest.mark.filterwarnings("ignore")
def test_against_torchmetrics():
    module = pytest.importorskip("torchmetrics.image.inception")
    logits = 3 * normal(200, 12)
    their = module.InceptionScore(feature=torch.nn.Identity(), splits=1)
    their.features.append(logits)
    assert inception_score(logits, splits=1).mean == pytest.approx(float(their.compute()[0]), rel=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n, theirs_of_sure", [(200, 20), (21, 3)])
def test_where_torchmetrics_differs(n, theirs_of_sure, monkeypatch):
    """In the order of one shuffle: its deviation divides by one split less, and of 21 rows it makes 7 splits."""
    module = pytest.importorskip("torchmetrics.image.inception")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(hash_seed(0)))
    monkeypatch.setattr(module.torch, "randperm", lambda *a, **k: order)

    def theirs(logits):
        metric = module.InceptionScore(feature=torch.nn.Identity(), splits=10)
        metric.features.append(logits)
        return [float(value) for value in metric.compute()]

    logits = 3 * normal(n, 12)
    mean, std = theirs(logits)
    ours = inception_score(logits)
    assert (ours.mean == pytest.approx(mean, rel=1e-10)) is (n % 10 == 0)
    if n % 10 == 0:
        assert ours.std * (10 / 9) ** 0.5 == pytest.approx(std, rel=1e-10)
    assert theirs(100 * torch.eye(n, dtype=torch.float64))[0] == pytest.approx(theirs_of_sure, rel=1e-10)


def test_the_shuffle_is_private_and_seeded():
    logits = 3 * normal(100, 5)
    assert inception_score(logits) == inception_score(logits) != inception_score(logits, seed=1)
    assert inception_score(logits, splits=1).mean == pytest.approx(inception_score(logits.flip(0), splits=1).mean)


def test_errors():
    with pytest.raises(ValueError, match="9 features, but the Inception Score with splits=10 needs at least 10"):
        inception_score(normal(9, 4))
    with pytest.raises(ValueError, match="splits=0"):
        inception_score(normal(9, 4), splits=0)
    logits = normal(12, 4)
    logits[5] = float("nan")
    with pytest.raises(ValueError, match="row 5 is not finite"):
        inception_score(logits)
