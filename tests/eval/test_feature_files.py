"""Measured features in files, and statistics that other libraries wrote, as sides of an evaluation."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genkit.eval.extractors.base import function_extractor, get_extractor
from genkit.eval.feature_files import is_features, load_features, save_features
from genkit.eval.inputs import ImageSet, read_images
from genkit.eval.metrics.base import FeatureSet
from genkit.eval.run import evaluate, measure
from genkit.eval.statistics import FeatureStats


@pytest.fixture(scope="module")
def halves():
    digits = read_images("digits")
    return digits.subset(torch.arange(0, 1797, 2)), digits.subset(torch.arange(1, 1797, 2))


@pytest.fixture(scope="module")
def reference(halves):
    return measure(halves[0], get_extractor("digits"), quiet=True)


def test_a_reference_is_measured_once(halves, reference, tmp_path):
    save_features(tmp_path / "ref.safetensors", reference)
    assert is_features(tmp_path / "ref.safetensors") and not is_features(tmp_path / "none.safetensors")
    again = load_features(tmp_path / "ref.safetensors")
    for name in ("features", "logits", "labels"):
        assert torch.equal(getattr(again, name), getattr(reference, name))
    assert torch.equal(again.stats.scatter, reference.stats.scatter) and again.stats.meta == reference.stats.meta
    direct = evaluate(halves[0], halves[1], quiet=True)
    saved = evaluate(tmp_path / "ref.safetensors", halves[1], quiet=True)
    assert saved.values == direct.values and saved.protocol == direct.protocol and saved.notes == direct.notes
    assert {"precision", "coverage", "frechet_distance"} <= set(saved.values)
    first = (tmp_path / "ref.safetensors").read_bytes()
    save_features(tmp_path / "ref.safetensors", reference)
    assert (tmp_path / "ref.safetensors").read_bytes() == first


def test_prompts_and_notes_go_along(tmp_path):
    x = read_images("digits").load(torch.arange(6))
    images = ImageSet("six", 6, lambda i: x[i], prompts=list("abcdef"), notes=("beware",), kind="PNG L 8x8")
    save_features(tmp_path / "a.safetensors", measure(images, get_extractor("digits"), quiet=True))
    again = load_features(tmp_path / "a.safetensors")
    assert again.prompts == list("abcdef") and again.n == 6
    found = evaluate(tmp_path / "a.safetensors", images, metrics=["frechet"], quiet=True)
    assert found.notes.count("beware") == 2 and found.protocol.matched == "prompts"
    assert found.protocol.reference_images == "PNG L 8x8"
    with pytest.raises(ValueError, match="strict: the reference set: beware"):
        evaluate(tmp_path / "a.safetensors", images, metrics=["frechet"], strict=True, quiet=True)


def test_bad_files_are_refused(reference, halves, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable file of features"):
        evaluate(path, halves[1], quiet=True)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"expected features that 'genkit eval features' wrote, found \['weight'\]"):
        load_features(path)
    with pytest.raises(ValueError, match="saved with the suffix .safetensors"):
        save_features(tmp_path / "a.npz", reference)
    unknown = FeatureStats(3)
    unknown.n = None
    with pytest.raises(ValueError, match="do not say their n"):
        save_features(path, FeatureSet(unknown))
    save_features(path, FeatureSet(reference.stats, reference.features[:5]))
    with pytest.raises(ValueError, match="n=899, rows {'features': 5}"):
        load_features(path)


def test_they_are_cut_to_what_would_be_drawn_of_the_images(reference, halves, tmp_path):
    save_features(tmp_path / "a.safetensors", reference)
    cut = evaluate(tmp_path / "a.safetensors", halves[1], n=200, quiet=True)
    images = evaluate(halves[0], halves[1], n=200, quiet=True)
    assert cut.protocol.n_real == 200 and cut.values == pytest.approx(images.values, rel=1e-4)
    with pytest.raises(ValueError, match="reference set has the features of 899 images, 2000 are needed"):
        evaluate(tmp_path / "a.safetensors", halves[1], n=2000, quiet=True)
    reference.stats.save(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="reference statistics are of n=899 images and cannot be cut to n=200"):
        evaluate(tmp_path / "a.npz", halves[1], n=200, metrics=["frechet"], quiet=True)


def test_features_of_another_extractor_are_refused(reference, halves, tmp_path):
    save_features(tmp_path / "a.safetensors", reference)
    other = function_extractor(lambda images: images.flatten(1).float(), 64, "pixels")
    with pytest.raises(ValueError, match="reference statistics were made with extractor 'digits.*uses 'pixels'"):
        evaluate(tmp_path / "a.safetensors", halves[1], extractor=other, quiet=True)


@pytest.mark.parametrize("extra", [{}, {"mu_s": np.zeros(7), "sigma_s": np.eye(7)}, {"arr_0": np.zeros((2, 8, 8, 3))}])
def test_statistics_of_other_libraries(reference, halves, tmp_path, extra):
    """pytorch-fid and clean-fid: mu and sigma; ADM: those of spatial features too, and sometimes the images."""
    stats = reference.stats
    np.savez(tmp_path / "theirs.npz", mu=stats.mean.numpy(), sigma=stats.covariance.numpy(), **extra)
    found = evaluate(tmp_path / "theirs.npz", halves[1], metrics=["frechet"], quiet=True)
    direct = evaluate(reference, halves[1], metrics=["frechet"], quiet=True)
    assert found.values["frechet_distance"] == pytest.approx(direct.values["frechet_distance"], rel=1e-9)
    assert found.protocol.reference == "theirs.npz" and found.protocol.n_real is None
    assert found.protocol.reference_images is None
    assert any("do not say how many images" in note for note in found.notes)
    assert any("do not say which extractor" in note for note in found.notes)


def test_statistics_of_other_dimensions_are_refused(halves, tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="reference statistics have 2048 dimensions, extractor 'digits.*' 128"):
        evaluate(tmp_path / "theirs.npz", halves[1], quiet=True)
