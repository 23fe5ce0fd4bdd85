"""Extractors that are other libraries' own paths."""

import warnings
from importlib import metadata

import pytest
import torch
from torch import nn

from genkit.eval.extractors import clean_fid
from genkit.eval.extractors.base import extract, get_extractor
from genkit.eval.extractors.clean_fid import SCRIPT, CleanFIDExtractor
from genkit.eval.extractors.inception import NAMES, InceptionExtractor
from genkit.eval.extractors.torchmetrics import TorchmetricsExtractor
from genkit.eval.resize import RULES
from genkit.eval.run import evaluate
from tests.eval.extractors import inception_weights


def images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Layers(nn.Module):
    """2048 features of a picture: its means in 26 x 26 squares of each channel, and some zeros."""

    def forward(self, x):
        return nn.functional.pad(nn.functional.adaptive_avg_pool2d(x, (26, 26)).flatten(1), (0, 20))


class Scripted(nn.Module):
    """Of the form of the network that clean-fid downloads."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x, return_features: bool = False):
        return self.layers((x - 128) / 128)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def script(tmp_path, monkeypatch):
    features = pytest.importorskip("cleanfid.features")
    torch.jit.script(Scripted()).save(str(tmp_path / SCRIPT))
    theirs = features.InceptionV3W
    monkeypatch.setattr(features, "InceptionV3W", lambda path, **kwargs: theirs(str(tmp_path), **kwargs))
    monkeypatch.setattr(clean_fid, "FOLDER", tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_clean_fid_as_the_package_computes_it(script, tmp_path):
    from PIL import Image

    fid = pytest.importorskip("cleanfid.fid")
    batch = images(2, 3, 40, 56)
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for file, row in zip(files, batch, strict=True):
        Image.fromarray(row.permute(1, 2, 0).numpy()).save(file)
    for mode in ("clean", "legacy_tensorflow"):
        extractor = CleanFIDExtractor(mode)
        ours = next(extract(extractor, [batch])).features
        model = fid.build_feature_extractor(mode, torch.device("cpu"), use_dataparallel=False)
        theirs = fid.get_files_features(
            files, model, num_workers=0, device=torch.device("cpu"), mode=mode, verbose=False
        )
        assert torch.equal(ours, torch.from_numpy(theirs))
    clean = next(extract(CleanFIDExtractor(), [batch])).features
    wanted = Layers()((RULES["clean"](batch, 299) - 128) / 128)
    torch.testing.assert_close(clean, wanted, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clean_fid_names(script, monkeypatch):
    version = metadata.version("clean-fid")
    assert CleanFIDExtractor().id.startswith(f"clean-fid-{version}/clean/")
    assert CleanFIDExtractor().distance == "clean_fid"
    assert get_extractor("clean_fid:mode=legacy_tensorflow").distance == "clean_fid[legacy_tensorflow]"
    with pytest.raises(ValueError, match="mode='legacy' is not known"):
        CleanFIDExtractor("legacy")


def test_clean_fid_legacy_pytorch_is_ours_with_the_rule_pytorch(hub):
    pytest.importorskip("cleanfid")
    torch.save(inception_weights.state(), hub / NAMES[0])
    before, filters = torch.get_rng_state(), list(warnings.filters)
    extractor = CleanFIDExtractor("legacy_pytorch")
    assert torch.equal(before, torch.get_rng_state()) and warnings.filters == filters
    batch = images(1, 3, 32, 48)
    theirs = next(extract(extractor, [batch])).features
    ours = next(extract(InceptionExtractor(resize="pytorch"), [batch])).features
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    tf1 = next(extract(InceptionExtractor(), [batch])).features
    assert (tf1 - theirs).abs().max() > 100 * (ours - theirs).abs().max()


def test_clean_fid_downloads_nothing(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(clean_fid, "FOLDER", tmp_path / "absent")
    with pytest.raises(ValueError, match=r"curl -L --create-dirs -o .*absent/inception-2015-12-05.pt https://nvlabs"):
        CleanFIDExtractor()
    with pytest.raises(ValueError, match=f"-o {hub / NAMES[0]} https://github.com/mseitzer/"):
        CleanFIDExtractor("legacy_pytorch")

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(clean_fid.metadata, "version", absent)
    with pytest.raises(ValueError, match="pip install clean-fid"):
        CleanFIDExtractor()


class Means(nn.Module):
    """As users of torchmetrics give it: uint8 in, features out."""

    def __init__(self, num_features=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        if num_features is not None:
            self.num_features = num_features

    def forward(self, x):
        return self.scale * nn.functional.adaptive_avg_pool2d(x.double(), 2).flatten(1)


def test_torchmetrics_gives_the_same_distance_with_the_same_network():
    fid = pytest.importorskip("torchmetrics.image.fid")
    real, fake = images(40, 3, 8, 8), images(50, 3, 8, 8, seed=1)
    metric = fid.FrechetInceptionDistance(feature=Means(12)).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = evaluate(real, fake, extractor=TorchmetricsExtractor(Means(12)), metrics=["frechet"], quiet=True)
    assert ours.values["frechet_distance"] == pytest.approx(float(metric.compute()), rel=1e-5)


def test_torchmetrics_counts_features_without_drawing_from_our_stream():
    pytest.importorskip("torchmetrics")
    before = torch.get_rng_state()
    extractor = TorchmetricsExtractor(Means())
    assert extractor.dim == 12 and extractor.id.startswith("torchmetrics-Means/given/")
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="weights=x.pth, antialias=None are of torchmetrics' own network"):
        TorchmetricsExtractor(Means(), weights="x.pth")
    with pytest.raises(ValueError, match="network='means': accepted is a torch.nn.Module"):
        get_extractor("torchmetrics:network=means")


def test_torchmetrics_own_network(hub, monkeypatch):
    pytest.importorskip("torchmetrics")
    with pytest.raises(ValueError, match=f"curl -L --create-dirs -o {hub / NAMES[1]} https://github.com/toshas"):
        TorchmetricsExtractor()
    (hub / NAMES[1]).write_bytes(b"weights")
    fid = pytest.importorskip("torchmetrics.image.fid")
    if not fid._TORCH_FIDELITY_AVAILABLE:
        with pytest.raises(ValueError, match="pip install torch-fidelity"):
            TorchmetricsExtractor()


def test_torchmetrics_own_network_is_asked_for_with_our_settings(hub, monkeypatch):
    # Without torch-fidelity: what torchmetrics would be given.
    fid = pytest.importorskip("torchmetrics.image.fid")
    (hub / NAMES[1]).write_bytes(b"weights")
    asked = []

    class Stand(fid.FrechetInceptionDistance):
        def __init__(self, feature=2048, feature_extractor_weights_path=None, antialias=True):
            asked.append((feature, feature_extractor_weights_path, antialias))
            super().__init__(feature=Means(12))

    monkeypatch.setattr(fid, "FrechetInceptionDistance", Stand)
    assert TorchmetricsExtractor().distance == "torchmetrics_fid"
    assert get_extractor("torchmetrics:antialias=False").distance == "torchmetrics_fid[tf1]"
    assert asked == [(2048, str(hub / NAMES[1]), True), (2048, str(hub / NAMES[1]), False)]

    class Old(fid.FrechetInceptionDistance):
        def __init__(self, feature=2048, feature_extractor_weights_path=None):
            super().__init__()

    monkeypatch.setattr(fid, "FrechetInceptionDistance", Old)
    with pytest.raises(ValueError, match="antialias=True needs torchmetrics 1.9"):
        TorchmetricsExtractor()
    assert TorchmetricsExtractor(antialias=False).id.startswith("torchmetrics-Means/tf1/")
