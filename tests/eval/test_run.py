import json

import numpy as np
import pytest
import torch

from genkit.eval import command
from genkit.eval.command import main
from genkit.eval.extractors.base import get_extractor
from genkit.eval.inputs import read_images
from genkit.eval.metrics.base import Metric, all_metrics
from genkit.eval.metrics.frechet import FrechetDistance
from genkit.eval.metrics.prdc import PrecisionRecallDensityCoverage
from genkit.eval.result import Result, require_comparable
from genkit.eval.run import evaluate, measure


@pytest.fixture(scope="module")
def real():
    images = read_images("digits")
    return images.load(torch.arange(images.n)), images.labels


@pytest.fixture(scope="module")
def halves(real):
    x, y = real
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    a, b = order[:898], order[898:1796]
    return (x[a], y[a]), (x[b], y[b])


@pytest.fixture(scope="module")
def result(halves):
    return evaluate(*halves, nfe=32, quiet=True)


def test_every_metric_by_default(result):
    assert set(result.values) == {
        "frechet_distance", "frechet_raw", "precision", "recall", "density", "coverage", "class_accuracy"
    }  # fmt: skip
    assert {m.name for m in all_metrics() if m.by_default} == {"frechet", "prdc", "accuracy"}
    assert result.values["class_accuracy"] > 0.985 and result.values["coverage"] > 0.9


def test_protocol_says_how(result):
    protocol = result.protocol
    assert protocol.extractor == get_extractor("digits").id
    assert (protocol.n_real, protocol.n_gen, result.nfe) == (898, 898, 32)
    assert protocol.metrics["prdc"] == {"pr_k": 3, "dc_k": 5} and protocol.versions["torch"] == torch.__version__
    assert result.notes == []


def test_json_round_trip(result, tmp_path):
    result.save(tmp_path / "r.json")
    assert Result.load(tmp_path / "r.json") == result
    assert json.loads((tmp_path / "r.json").read_text())["values"]["precision"] == result.values["precision"]


def test_blurry_samples_are_far_away(real, halves, result):
    x, y = real
    means = torch.stack([x[y == c].float().mean(0) for c in range(10)]).round().to(torch.uint8)
    blurry = evaluate(halves[0], (means[halves[1][1]], halves[1][1]), quiet=True).values
    assert blurry["frechet_distance"] > 10 * result.values["frechet_distance"]
    assert blurry["recall"] < 0.05 and blurry["coverage"] < 0.2


def test_a_measured_reference_gives_the_same(halves, result, tmp_path):
    extractor = get_extractor("digits")
    reference = measure(read_images(halves[0]), extractor, quiet=True, batch_size=100)
    again = evaluate(reference, halves[1], extractor=extractor, batch_size=77, quiet=True)
    assert again.values == pytest.approx(result.values, rel=1e-4)
    reference.stats.save(tmp_path / "ref.npz")
    saved = evaluate(tmp_path / "ref.npz", halves[1], quiet=True)  # no features in the file: no prdc
    assert set(saved.values) == {"frechet_distance", "frechet_raw", "class_accuracy"}
    assert saved.values["frechet_distance"] == pytest.approx(result.values["frechet_distance"], rel=1e-4)
    assert saved.protocol.n_real == 898


def test_statistics_of_another_extractor_are_refused(halves, tmp_path):
    stats = measure(read_images(halves[0]), get_extractor("digits"), quiet=True).stats
    stats.save(tmp_path / "ref.npz", {"extractor": "digits/no-resize/older"})
    with pytest.raises(ValueError, match="made with extractor 'digits/no-resize/older'"):
        evaluate(tmp_path / "ref.npz", halves[1])
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="2048 dimensions, extractor .* 128"):
        evaluate(tmp_path / "inception.npz", halves[1])
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(128), sigma=np.eye(128))
    result = evaluate(tmp_path / "foreign.npz", halves[1], metrics=["frechet"], quiet=True)
    assert result.protocol.n_real is None and len(result.notes) == 2


def test_metrics_that_lack_something_are_refused_by_name(halves):
    with pytest.raises(
        ValueError, match=r"'accuracy' needs generated labels\. Possible here: .*cmmd, .*frechet, .*prdc"
    ):
        evaluate(halves[0], halves[1][0], metrics=["frechet", "accuracy"], quiet=True)
    with pytest.raises(
        ValueError, match=r"'frechet' needs reference stats\. Possible here: accuracy, .*inception_score"
    ):
        evaluate(None, halves[1], metrics=["frechet"], quiet=True)
    assert set(evaluate(None, halves[1], quiet=True).values) == {"class_accuracy"}
    with pytest.raises(
        ValueError, match=r"no default metric is possible with these inputs\. Possible here: .*inception_score"
    ):
        evaluate(None, halves[1][0], quiet=True)
    with pytest.raises(ValueError, match="metrics='frechett' is not known; did you mean 'frechet'"):
        evaluate(*halves, metrics=["frechett"])
    with pytest.raises(ValueError, match="'prdc' is named twice"):
        evaluate(*halves, metrics=["prdc", PrecisionRecallDensityCoverage(pr_k=1)])
    with pytest.raises(ValueError, match="needs generated labels") as error:  # with pairs of unequal counts, grey ones
        evaluate(halves[0], halves[1][0][:50], metrics=["accuracy"], quiet=True)
    assert not {"psnr", "ssim", "saturation"} & set(str(error.value).replace(".", ",").split(", "))
    with pytest.raises(ValueError, match=r"saturation of grey images \(uint8 L 8x8\)"):
        evaluate(*halves, metrics=["saturation"], quiet=True)
    with pytest.raises(ValueError, match="metrics is empty"):
        evaluate(*halves, metrics=[])


def test_metric_settings(halves):
    chosen = [PrecisionRecallDensityCoverage(pr_k=1, dc_k=2), FrechetDistance()]
    result = evaluate(*halves, metrics=chosen, quiet=True)
    assert result.protocol.metrics == {"prdc": {"pr_k": 1, "dc_k": 2}, "frechet": {}}


def test_a_metric_of_ones_own(halves):
    class MeanNorm(Metric):
        reads_reference = ()
        reads_generated = ("features",)

        def __call__(self, reference, generated):
            return {"mean_norm": float(generated.features.norm(dim=1).mean())}

    assert evaluate(None, halves[1], metrics=[MeanNorm()], quiet=True).values["mean_norm"] > 0


def test_n_draws_the_same_subset_for_the_same_seed(real):
    runs = [evaluate("digits", real, metrics=["frechet"], n=200, seed=s, quiet=True) for s in (1, 1, 2)]
    assert runs[0].values == runs[1].values
    assert runs[0].protocol.n_real == runs[0].protocol.n_gen == 200
    a, b = (evaluate(real, real, metrics=["accuracy"], n=500, seed=s, quiet=True).protocol for s in (1, 2))
    assert a.seed != b.seed
    assert runs[0].values["frechet_distance"] > 1  # the two sides are drawn apart
    with pytest.raises(ValueError, match="generated set 'tensor' has 10 images, 20 are needed"):
        evaluate("digits", real[0][:10], n=20)
    with pytest.raises(ValueError, match="has 1 images, 2 are needed"):
        evaluate("digits", real[0][:1])


@pytest.mark.parametrize("setting", [{"n": 1}, {"n": 0}, {"batch_size": 0}, {"nfe": -1.0}])
def test_bad_settings(halves, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        evaluate(*halves, quiet=True, **setting)


def test_unequal_counts_are_noted_and_never_compared(real, halves, result):
    x, y = real
    other = evaluate(halves[0], (x[:500], y[:500]), quiet=True)
    assert any("898 real and 500 generated" in note for note in other.notes)
    with pytest.raises(ValueError, match=r"different n_gen cannot be compared: \['500', '898'\]"):
        require_comparable([result, other])
    assert not any("recall" in note for note in evaluate(halves[0], x[:500], metrics=["frechet"], quiet=True).notes)
    require_comparable([result, result])
    changed = evaluate(*halves, metrics=[PrecisionRecallDensityCoverage(dc_k=3)], quiet=True)
    with pytest.raises(ValueError, match="different settings of 'prdc'"):
        require_comparable([result, changed])


@pytest.mark.filterwarnings("ignore:.*rank deficient")
def test_few_images_are_noted(real):
    result = evaluate(real[0][:40], real[0][40:80], metrics=["frechet"], quiet=True)
    assert any("fewer images (40) than feature dimensions (128)" in note for note in result.notes)


def test_the_global_random_state_is_left_alone(halves):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    evaluate(*halves, n=200, quiet=True)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()


def test_main_writes_and_prints(halves, tmp_path, capsys):
    path = tmp_path / "gen.npz"
    np.savez(path, images=halves[1][0].numpy(), labels=halves[1][1].numpy())
    result = main(
        "digits", str(path), metrics=["frechet", "accuracy"], nfe=4, n=300,
        json_path=tmp_path / "r.json", html_path=tmp_path / "r.html",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "frechet_distance" in printed and "n_gen 300" in printed and "NFE" in printed
    assert "frechet_raw" not in printed  # the same number
    assert Result.load(tmp_path / "r.json") == result
    html = (tmp_path / "r.html").read_text()
    assert result.protocol.extractor in html and html.count("data:image/png;base64,") == 2
    main("digits", str(path), metrics=["accuracy"], quiet=True)
    assert capsys.readouterr().out == ""


def test_the_page_has_the_intervals(halves, tmp_path):
    path = tmp_path / "gen.npz"
    np.savez(path, images=halves[1][0].numpy(), labels=halves[1][1].numpy())
    page = tmp_path / "r.html"
    low, high = main(
        "digits", str(path), metrics=["contrast"], intervals=40, html_path=page, quiet=True
    ).intervals["contrast"]  # fmt: skip
    assert f"{low:.3f} – {high:.3f}" in page.read_text() and "95 % intervals" in page.read_text()


def test_main_refuses_a_missing_output_folder_first(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "evaluate", lambda *a, **k: pytest.fail("work had started"))
    with pytest.raises(ValueError, match="absent does not exist"):
        main("digits", "digits", json_path=tmp_path / "absent" / "r.json")
