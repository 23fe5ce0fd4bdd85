"""One call a number, from folders or tensors."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

import genkit.eval
from genkit.eval.extractors.base import Extractor, Features
from genkit.eval.inputs import read_images
from genkit.eval.metrics.cmmd import cmmd
from genkit.eval.metrics.frechet import frechet_distance
from genkit.eval.metrics.inception_score import inception_score
from genkit.eval.metrics.kid import kid
from genkit.eval.metrics.prdc import prdc

pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient")


class Pixels(Extractor):
    """Six pixels as features, and as logits."""

    id, dim, num_classes, distance = "pixels", 6, 6, "fd_pixels"

    def __call__(self, images):
        rows = images.flatten(1)[:, 20:26].float() / 16 + 1
        return Features(rows, rows)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Digits in two folders, and the features of both."""
    images, folder = read_images("digits"), tmp_path_factory.mktemp("sets")
    halves = images.load(torch.arange(60)), images.load(torch.arange(60, 110))
    for name, half in zip(("real", "fake"), halves, strict=True):
        (folder / name).mkdir()
        for i, image in enumerate(half):
            Image.fromarray(image[0].numpy()).save(folder / name / f"{i:03}.png")
    x, y = (Pixels()(half).features for half in halves)
    return (str(folder / "real"), folder / "fake"), halves, x, y


def test_each_is_its_metric(sets):
    folders, halves, x, y = sets
    options = dict(extractor=Pixels(), quiet=True)
    for pair in (folders, halves):
        assert genkit.eval.fid(*pair, **options) == pytest.approx(frechet_distance(x, y), rel=1e-9)
        assert genkit.eval.fd_dinov2(*pair, **options) == genkit.eval.fid(*pair, **options)
        assert genkit.eval.kid(*pair, **options) == kid(x, y)
        assert genkit.eval.cmmd(*pair, **options) == cmmd(x, y)
        assert genkit.eval.precision_recall(*pair, pr_k=2, dc_k=4, **options) == prdc(x, y, pr_k=2, dc_k=4)
        scores = genkit.eval.inception_score(pair[1], splits=3, shuffle_seed=5, **options)
        assert scores == inception_score(y, splits=3, seed=5)


def test_options_are_those_of_evaluate(sets):
    folders, _, _, _ = sets
    with pytest.raises(ValueError, match="n=500: |has 60 images, 500 are needed"):
        genkit.eval.fid(*folders, extractor=Pixels(), n=500)
    with pytest.raises(TypeError, match="batchsize"):
        genkit.eval.fid(*folders, extractor=Pixels(), batchsize=3)


@pytest.mark.parametrize(
    ("call", "extractor"),
    [("fid", "inception"), ("kid", "inception"), ("fd_dinov2", "dinov2"), ("cmmd", "clip")],
)
def test_weights_that_are_not_here_are_not_fetched(call, extractor, sets, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folders, _, _, _ = sets
    with pytest.raises(ValueError, match=rf"(?s){extractor}.*\n  (curl|hf) "):
        getattr(genkit.eval, call)(*folders)


def test_the_package_costs_no_torch_and_names_what_it_has():
    code = "import genkit.eval, sys; assert 'torch' not in sys.modules; print(' '.join(dir(genkit.eval)))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"evaluate", "fid", "kid", "win_rate", "read_images"} <= set(names)
    assert all(getattr(genkit.eval, name).__doc__ for name in genkit.eval.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fif'"):
        _ = genkit.eval.fif
