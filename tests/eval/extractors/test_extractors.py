import hashlib
import sys
import time

import pytest
import torch

from genkit import _lazy
from genkit.eval.extractors.base import Extractor, extract, full_float32, function_extractor, get_extractor
from genkit.eval.extractors.digits import WEIGHTS, DigitsExtractor
from genkit.eval.inputs import read_images
from genkit.registry import members


@pytest.fixture(scope="module")
def digits():
    return DigitsExtractor()


@pytest.fixture(scope="module")
def real():
    images = read_images("digits")
    return images.load(torch.arange(images.n)), images.labels


def test_found_by_name_while_only_registered(monkeypatch):
    # As in a fresh process: the module is in sys.modules, but has not run yet.
    monkeypatch.delitem(sys.modules, "genkit.eval.extractors.digits")
    _lazy.register_tree("genkit.eval.extractors.digits")
    members.cache_clear()
    assert get_extractor("digits").dim == 128
    members.cache_clear()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="extractor='digit' is not known; did you mean 'digits'"):
        get_extractor("digit")
    with pytest.raises(ValueError, match="function_extractor"):
        get_extractor(lambda x: x)


def test_shipped_weights(digits, real):
    images, labels = real
    assert WEIGHTS.stat().st_size < 120_000
    assert digits.id == f"digits/no-resize/{hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:12]}"
    from sklearn.model_selection import train_test_split

    seed = digits.training["seed"]
    _, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=seed)
    with torch.no_grad():
        accuracy = (digits(images[test]).logits.argmax(1) == labels[test]).double().mean().item()
    assert accuracy >= 0.985
    assert accuracy == pytest.approx(digits.training["test_accuracy"], abs=1 / 360)  # one borderline digit at most


def test_features_have_not_collapsed_to_a_point_a_class(digits, real):
    images, labels = real
    with torch.no_grad():
        features = digits(images).features.double()
    within = sum(torch.cov(features[labels == c].T).trace() for c in range(10)) / 10
    assert within / torch.cov(features.T).trace() > 0.3
    spectrum = torch.linalg.eigvalsh(torch.cov(features.T))
    assert spectrum.sum() ** 2 / spectrum.square().sum() > 10  # participation ratio: directions that carry variance


def test_quick(digits, real):
    start = time.perf_counter()
    with torch.no_grad():
        digits(real[0])
    assert time.perf_counter() - start < 5  # 0.1 s on an idle core; the bound is for busy ones


def test_wrong_images_are_refused(digits):
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\), got \(2, 3, 8, 8\); others, as 'inception'"):
        digits(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got \(2, 1, 16, 16\)"):
        digits(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="takes uint8 images, got torch.float32"):
        digits(torch.zeros(2, 1, 8, 8))


def test_batch_size_does_not_matter(digits, real):
    images = real[0][:100]
    whole = next(extract(digits, [images])).features
    parts = torch.cat([out.features for out in extract(digits, images.split(7))])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)
    assert not whole.requires_grad and whole.dtype == torch.float32


def test_any_function_is_an_extractor():
    extractor = function_extractor(lambda images: images.flatten(1).half(), 12, "pixels")
    assert isinstance(extractor, Extractor) and extractor.id == "pixels"
    assert extractor(torch.ones(2, 3, 2, 2, dtype=torch.uint8)).features.dtype == torch.float32
    with pytest.raises(ValueError, match=r"'pixels' returned \(2, 3\); expected a tensor \(2, 12\)"):
        extractor(torch.ones(2, 3, 1, 1, dtype=torch.uint8))


def test_tf32_and_autocast_are_off_during_extraction_and_restored():
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    seen = []

    def look(images):
        seen.append((matmul.fp32_precision, conv.fp32_precision, torch.is_autocast_enabled("cpu")))
        return images.flatten(1).float()

    matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu"):
            list(extract(function_extractor(look, 4, "look"), [torch.ones(2, 1, 2, 2, dtype=torch.uint8)]))
        assert seen == [("ieee", "ieee", False)]
        assert matmul.fp32_precision == "tf32" and conv.fp32_precision == before[1]
        with pytest.raises(RuntimeError), full_float32():
            raise RuntimeError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before[0]
