import hashlib
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genkit.eval.extractors import inception
from genkit.eval.extractors.base import extract, get_extractor
from genkit.eval.extractors.inception import NAMES, PUBLISHED, URL, InceptionExtractor
from genkit.eval.resize import RULES
from tests.eval.extractors import inception_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return inception_weights.write(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def extractor(weights):
    return InceptionExtractor(weights)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_and_logits_under_batches(extractor):
    batch = images(3, 3, 40, 56)
    whole = next(extract(extractor, [batch]))
    assert whole.features.shape == (3, extractor.dim) and whole.logits.shape == (3, extractor.num_classes)
    parts = list(extract(extractor, batch.split(2)))
    for name in ("features", "logits"):
        together = getattr(whole, name)
        split = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(split, together, rtol=1e-5, atol=1e-5 * together.abs().max().item())
    assert (whole.features[0] - whole.features[1]).abs().max() > 0.01


@torch.no_grad()
def test_what_the_network_sees(extractor, monkeypatch):
    seen = []
    monkeypatch.setattr(extractor.network, "forward", lambda x: seen.append(x) or (x.flatten(1), x.flatten(1)))
    batch = images(1, 3, 64, 64)
    for rule in RULES:
        extractor.with_resize(rule)(batch)
        pixels = RULES[rule](batch, 299)
        wanted = pixels / 127.5 - 1 if rule == "pytorch" else (pixels - 128) / 128
        torch.testing.assert_close(seen.pop(), wanted, rtol=0, atol=2e-6)
    extractor(batch[:, :1])  # grey images are repeated
    assert torch.equal(seen[0][:, 0], seen[0][:, 2])


def test_names(extractor, weights):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    assert extractor.id == f"inception-2015-12-05/tf1/{digest}"
    assert extractor.distance == f"fid[{digest}]"  # not the published weights
    clean = extractor.with_resize("clean")
    assert clean.id == f"inception-2015-12-05/clean/{digest}" and clean.network is extractor.network
    assert clean.distance == f"fid[{digest}][clean]" and extractor.resize == "tf1"


def test_published_weights_are_called_fid(weights, monkeypatch):
    monkeypatch.setattr(inception, "file_hash", lambda path: PUBLISHED)
    monkeypatch.setattr(inception, "_loaded", lambda path: torch.nn.Identity())
    assert all(PUBLISHED.startswith(name[-12:-4]) for name in NAMES)  # the part of the hash that the files are named by
    distances = [InceptionExtractor(weights, resize=rule).distance for rule in ("tf1", "antialias", "pytorch", "clean")]
    assert distances == ["fid", "fid[antialias]", "fid[pytorch]", "fid[clean]"]


def test_by_name_with_settings(weights):
    assert get_extractor(f"inception:weights={weights},resize=antialias").resize == "antialias"
    with pytest.raises(ValueError, match="resize='clear' is not known; did you mean 'clean'"):
        get_extractor(f"inception:weights={weights},resize=clear")


def test_safetensors_and_files_with_an_auxiliary_head_or_no_counters(extractor, tmp_path):
    state = inception_weights.state()
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]
    save_file(state | {"AuxLogits.fc.bias": torch.zeros(1008)}, tmp_path / "inception.safetensors")
    other = InceptionExtractor(tmp_path / "inception.safetensors")
    for name, value in extractor.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name])


def test_found_where_other_libraries_keep_them(hub, weights):
    (hub / NAMES[1]).symlink_to(weights)
    assert InceptionExtractor().resize == "tf1"


def test_missing_weights_give_the_command(hub):
    with pytest.raises(ValueError, match="curl -L") as error:
        InceptionExtractor()
    assert f"curl -L --create-dirs -o {hub / NAMES[0]} {URL}" in str(error.value)


def test_only_a_url_that_is_named_is_fetched(hub, weights, monkeypatch):
    asked = []

    def download(url, file):
        asked.append(url)
        (hub / "some.pth").write_bytes(weights.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):  # the second time it is there
        InceptionExtractor("https://example.org/some.pth")
    assert asked == ["https://example.org/some.pth"]


def test_bad_weights(tmp_path, weights):
    with pytest.raises(ValueError, match="clean_fid:mode=legacy_tensorflow"):
        InceptionExtractor(tmp_path / "inception-2015-12-05.pt")
    with pytest.raises(ValueError, match="accepted are a .pth or .safetensors file and a URL"):
        InceptionExtractor(tmp_path / "absent.pth")
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated.pth cannot be read"):
        InceptionExtractor(truncated)
    (tmp_path / "truncated.safetensors").write_bytes(b"\x08\x00\x00")
    with pytest.raises(ValueError, match="truncated.safetensors cannot be read"):
        InceptionExtractor(tmp_path / "truncated.safetensors")
    state = inception_weights.state()
    save_file(state | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.safetensors")
    with pytest.raises(ValueError, match=r"'fc.weight', found \(1000, 2048\), wanted \(1008, 2048\)"):
        InceptionExtractor(tmp_path / "torchvision.safetensors")


def test_weights_that_run_code_are_refused(tmp_path):
    torch.save({"fc.bias": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        InceptionExtractor(tmp_path / "code.pth")


def test_wrong_images(extractor):
    with pytest.raises(ValueError, match=r"takes images \(B, 3 or 1, H, W\), got \(1, 4, 8, 8\)"):
        extractor(images(1, 4, 8, 8))
    with pytest.raises(ValueError, match="takes uint8 images, got torch.float32"):
        extractor(torch.zeros(1, 3, 8, 8))


def test_random_states_are_left_alone(weights):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    made = InceptionExtractor(weights)
    next(extract(made, [images(1, 3, 16, 16)]))
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert not any(p.requires_grad for p in made.network.parameters())
