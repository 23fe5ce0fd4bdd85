"""torch-fidelity on the same features, wherever it is installed."""

import pytest
import torch

from genkit.eval.extractors.base import get_extractor
from genkit.eval.inputs import read_images
from genkit.eval.metrics.frechet import frechet_distance
from genkit.eval.metrics.inception_score import inception_score
from genkit.eval.metrics.kid import kid
from genkit.eval.metrics.prdc import prdc
from genkit.eval.run import measure

fid, isc, mmd, neighbours = (
    pytest.importorskip(f"torch_fidelity.metric_{name}", reason="torch-fidelity is not installed")
    for name in ("fid", "isc", "kid", "prc")
)


@pytest.fixture(scope="module")
def sides():
    """Features and logits of the digits at odd and at even places."""
    found = measure(read_images("digits"), get_extractor("digits"), quiet=True)
    return found.rows(torch.arange(0, 1600, 2)), found.rows(torch.arange(1, 1600, 2))


def test_frechet_distance(sides):
    x, y = (side.features.double() for side in sides)
    theirs = fid.fid_statistics_to_metric(*map(fid.fid_features_to_statistics, (x, y)), False)
    assert frechet_distance(x, y) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_kid_of_all_rows(sides):
    """One subset that is everything; its degree, scale and offset are ours."""
    x, y = (side.features.double() for side in sides)
    theirs = mmd.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=800, verbose=False)
    assert kid(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_inception_score(sides):
    logits = sides[1].logits
    theirs = isc.isc_features_to_metric(logits, splits=1, shuffle=False)
    assert inception_score(logits, splits=1).mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    order = isc.isc_features_to_metric(logits[torch.randperm(800, generator=torch.Generator().manual_seed(0))])
    ours = inception_score(logits)
    # Their shuffle is another, so splits are others, but their deviation divides by the number of splits as ours does.
    assert ours.mean == pytest.approx(order["inception_score_mean"], rel=0.01)
    sure = torch.zeros(100, 10)
    sure[:, 3] = 200
    assert isc.isc_features_to_metric(sure)["inception_score_mean"] == inception_score(sure).mean == 1.0


def test_precision_and_recall_with_the_generated_set_first(sides):
    real, fake = (side.features for side in sides)
    theirs = neighbours.prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=500, verbose=False)
    ours = prdc(real, fake)
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=2 / 800)
