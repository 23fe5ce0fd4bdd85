"""PSNR, SSIM, LPIPS, DISTS and EA-DISTS of pairs."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from genkit import perceptual
from genkit.eval.extractors.base import file_hash
from genkit.eval.inputs import read_images
from genkit.eval.metrics.base import FeatureSet, get_metric
from genkit.eval.metrics.dists import DISTS
from genkit.eval.metrics.ea_dists import EADISTS
from genkit.eval.metrics.lpips import LPIPS
from genkit.eval.metrics.psnr import PSNR, psnr
from genkit.eval.metrics.ssim import SSIM, ssim
from genkit.eval.run import evaluate
from genkit.eval.statistics import FeatureStats
from tests.test_perceptual import vgg


def pictures(seed, n=5, channels=3, size=(24, 20)):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, *size), generator=g, dtype=torch.uint8)


def side(images):
    return FeatureSet(FeatureStats(0), images=read_images(images))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_file(vgg(), path)
    return str(path)


def test_psnr_in_closed_form():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack((torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)))
    torch.testing.assert_close(
        psnr(x, y, data_range=1), torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(psnr(x, 255 * y, data_range=255), psnr(x, y, data_range=1), rtol=1e-6, atol=0)
    assert psnr(x, x, data_range=1).tolist() == [math.inf, math.inf]


def test_psnr_of_dark_images_is_not_measured_by_their_own_range():
    dark = torch.full((1, 3, 4, 4), 0.1)
    assert float(psnr(dark, dark * 0, data_range=1)) == pytest.approx(20, rel=1e-6)


def test_the_mean_ratio_is_not_the_ratio_of_the_mean():
    x, y = torch.zeros(2, 1, 5, 5, dtype=torch.uint8), torch.zeros(2, 1, 5, 5, dtype=torch.uint8)
    y[0], y[1] = 51, 5  # errors 1/25 and 1/2601
    values = PSNR()(side(x), side(y))
    assert values["psnr"] == pytest.approx(5 * math.log10(25 * 2601), rel=1e-12)
    assert values["psnr_of_mean_error"] == pytest.approx(-10 * math.log10((1 / 25 + 1 / 2601) / 2), rel=1e-12)


def test_psnr_and_ssim_against_torchmetrics():
    their = pytest.importorskip("torchmetrics.functional.image")
    x, y = pictures(0).double() / 255, pictures(1).double() / 255
    y = 0.7 * x + 0.3 * y
    want = their.peak_signal_noise_ratio(y, x, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(x, y, data_range=1), want, rtol=1e-6, atol=0)  # its logarithms are float32
    # Its mean is also over a frame of 5 pixels whose windows reach into reflections; ours is over the rest.
    mean, full = their.structural_similarity_index_measure(
        y, x, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = full[..., 5:-5, 5:-5].flatten(1).mean(1)
    torch.testing.assert_close(ssim(x, y, data_range=1), inside, rtol=1e-10, atol=0)
    assert (mean - inside).abs().max() > 1e-3


def test_ssim_by_definition():
    x, y = pictures(0, 2, 1, (12, 13)).double() / 255, pictures(1, 2, 1, (12, 13)).double() / 255
    at = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-at.square() / 4.5)
    window = torch.outer(window, window) / window.sum() ** 2
    want = []
    for a, b in zip(x[:, 0], y[:, 0], strict=True):
        values = []
        for i in range(2):
            for j in range(3):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        want.append(sum(values) / 6)
    torch.testing.assert_close(ssim(x, y, data_range=1), torch.stack(want), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ssim(x, x, data_range=1), torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_range_twice_too_wide_inflates_ssim():
    """As published by codes that give data_range=2 for images on [0, 1]: a blurred image of a 1/f spectrum."""
    g = torch.Generator().manual_seed(0)
    frequency = torch.fft.fftfreq(64)[:, None] ** 2 + torch.fft.rfftfreq(64) ** 2
    spectrum = torch.fft.rfft2(torch.randn(64, 64, generator=g)) / frequency.clamp(min=1e-4).sqrt()
    x = torch.fft.irfft2(spectrum)[None, None]
    x = (x - x.min()) / (x.max() - x.min())
    y = torch.nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
    assert ssim(x, y, data_range=2) > ssim(x, y, data_range=1) + 0.1
    torch.testing.assert_close(ssim(x, y, data_range=2), ssim(x / 2, y / 2, data_range=1))


def test_ssim_of_constants():
    x, y = torch.full((1, 3, 11, 11), 0.2), torch.full((1, 3, 11, 11), 0.6)
    assert float(ssim(x, y, data_range=1)) == pytest.approx((0.24 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-6)


@pytest.mark.parametrize("function", [psnr, ssim])
def test_bad_images(function):
    x = torch.rand(2, 3, 16, 16)
    for data_range in (0, -1):
        with pytest.raises(ValueError, match="data_range"):
            function(x, x, data_range=data_range)
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\) and \(1, 3, 16, 16\)"):
        function(x, x[:1], data_range=1)


def test_ssim_needs_its_window():
    with pytest.raises(ValueError, match="ssim: .* at least 11 x 11 pixels"):
        ssim(torch.rand(1, 1, 11, 10), torch.rand(1, 1, 11, 10), data_range=1)


def test_dists_are_those_of_the_modules(weights):
    x, y = pictures(0), pictures(1)
    module = perceptual.DISTS.load(weights)
    a, b = x.float() / 255, y.float() / 255
    assert DISTS(weights)(side(x), side(y))["dists"] == pytest.approx(float(module(a, b).mean()), rel=1e-5)
    edges = perceptual.EADISTS(module, "reflect")
    got = EADISTS(weights, padding="reflect")
    assert got(side(x), side(y))["ea_dists"] == pytest.approx(float(edges(a, b).mean()), rel=1e-5)
    made_of = f"vgg.safetensors/{file_hash(Path(weights))}/equal"
    assert got.settings == {"vgg": made_of, "padding": "reflect"}
    assert get_metric(f"dists:{weights}").settings == {"vgg": made_of}
    assert DISTS(weights)(side(x), side(x)) == {"dists": 0}


def test_published_weights_of_channels_are_told_from_equal_ones(weights, monkeypatch):
    monkeypatch.setattr(perceptual.dists, "_LEARNED", 3 + 4 + 6 + 8 + 8 + 8)  # as many as this narrow network has
    monkeypatch.setattr(perceptual.dists, "shipped", lambda *_: dict.fromkeys(("alpha", "beta"), torch.rand(37)))
    assert DISTS(weights).settings["vgg"].endswith("/learned")


def test_lpips_is_that_of_the_module(weights, monkeypatch):
    x, y = pictures(0), pictures(1)
    metric = LPIPS(weights, net="vgg")
    want = perceptual.LPIPS.load("vgg", weights)(x.float() / 255, y.float() / 255).mean()
    assert metric(side(x), side(y)) == {"lpips": pytest.approx(float(want), rel=1e-5)}
    made_of = f"vgg.safetensors/{file_hash(Path(weights))}"
    assert metric.settings == {"net": "vgg", "backbone": f"{made_of}/equal"}
    assert get_metric(f"lpips:net=vgg,backbone={weights}").settings == metric.settings
    learned = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate((4, 6, 8, 8, 8))}
    monkeypatch.setattr(perceptual.lpips, "shipped", lambda *_: learned)
    assert LPIPS(weights, net="vgg").settings["backbone"] == f"{made_of}/learned"
    with pytest.raises(
        ValueError, match=r"accepted is 'lpips:BACKBONE' \(BACKBONE: weights of the classifier: a file, or"
    ):
        get_metric("lpips")
    with pytest.raises(FileNotFoundError, match="absent"):
        get_metric("lpips:absent.safetensors")
    with pytest.raises(ValueError, match="backbone lacks .*net='squeeze'"):
        get_metric(f"lpips:net=squeeze,backbone={weights}")


def test_dists_without_weights():
    with pytest.raises(ValueError, match="metrics='dists': accepted is 'dists:VGG'"):
        get_metric("dists")
    with pytest.raises(FileNotFoundError, match="absent"):
        get_metric("dists:absent.safetensors")


def test_pairs_must_fit():
    with pytest.raises(ValueError, match="psnr pairs images: the reference has 5, the generated set 4"):
        PSNR()(side(pictures(0)), side(pictures(1, 4)))
    with pytest.raises(ValueError, match=r"ssim pairs images: those of the reference are \(3, 24, 20\)"):
        SSIM()(side(pictures(0)), side(pictures(1, size=(20, 24))))


def test_evaluate_needs_no_features_for_them(tmp_path):
    x, y = pictures(0, 70), pictures(1, 70)  # more than a batch
    result = evaluate(x, y, metrics=["psnr", "ssim"], extractor="none", quiet=True)
    assert result.values["psnr"] == pytest.approx(float(psnr(x / 255, y / 255, data_range=1).mean()), rel=1e-6)
    assert result.values["ssim"] == pytest.approx(float(ssim(x / 255, y / 255, data_range=1).mean()), rel=1e-6)
    assert result.protocol.extractor == "none" and result.protocol.n_gen == 70
    with pytest.raises(ValueError, match="'frechet' needs reference stats, generated stats"):
        evaluate(x, y, metrics=["frechet"], extractor="none", quiet=True)
    with pytest.raises(ValueError, match="n=10: the sides are drawn apart"):
        evaluate(x, y, metrics=["psnr"], extractor="none", n=10, quiet=True)
    equal = evaluate(x, x, metrics=["psnr"], extractor="none", quiet=True)
    equal.save(tmp_path / "r.json")
    assert type(equal).load(tmp_path / "r.json") == equal and equal.values["psnr"] == math.inf
