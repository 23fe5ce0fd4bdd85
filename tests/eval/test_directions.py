import pytest

from genkit.eval.directions import better, is_shown, with_count
from genkit.eval.metrics.base import PACKAGE, Metric
from genkit.eval.mmhm import METRICS
from genkit.registry import members


@pytest.mark.parametrize("name", sorted(set(members(PACKAGE, Metric)) - {"reward"}))  # whose values bear rewards' names
def test_every_metric_declares(name):
    assert members(PACKAGE, Metric)[name].better


def test_published_directions():
    assert {name: {"lower": "min", "higher": "max"}[better(name)] for name in METRICS} == METRICS


@pytest.mark.parametrize(
    "name, way",
    [
        ("fid[antialias]", "lower"),
        ("clean_fid", "lower"),
        ("rfid", "lower"),
        ("fd_dinov2", "lower"),
        ("lpips", "lower"),
        ("psnr", "higher"),
        ("jpeg", "higher"),
        ("saturation", None),
        ("frechet_raw", None),
        ("fidelity", None),
        ("anything", None),
    ],
)
def test_better(name, way):
    assert better(name) == way


def test_details_are_not_shown_unasked():
    assert is_shown("saturation") and is_shown("fid") and is_shown("clip_score")
    assert not is_shown("frechet_raw") and not is_shown("kid_subsets_std")


def test_distances_of_sets_bear_their_n():
    assert [with_count("fid", n) for n in (5000, 50_000, 1797, None)] == ["fid@5k", "fid@50k", "fid@1797", "fid"]
    assert with_count("kid", 1000) == "kid@1k" and with_count("frechet_distance", 10) == "frechet_distance@10"
    assert with_count("lpips", 5000) == "lpips" and with_count("recall", 5000) == "recall"
