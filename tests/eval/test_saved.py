import pytest
import torch

from genkit.eval.extractors.base import function_extractor
from genkit.eval.inputs import read_images
from genkit.eval.metrics.frechet import frechet_distance
from genkit.eval.metrics.realism import Realism
from genkit.eval.per_class import per_class
from genkit.eval.run import evaluate, measure
from genkit.eval.saved import EXTREMES, FIRST, IMAGES, RESULT, extremes, first_items, load_evaluation, ranking_score


@pytest.fixture(scope="module")
def halves():
    digits = read_images("digits")
    x, y = digits.load(torch.arange(digits.n)), digits.labels
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    a, b = order[:898], order[898:1796]
    bad = x[b].clone()
    bad[:9] = torch.randint(0, 256, bad[:9].shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return (x[a], y[a]), (bad, y[b])


def test_a_folder_has_what_a_report_needs(halves, tmp_path):
    result = evaluate(*halves, output=tmp_path / "e", metrics=["frechet", "accuracy", "contrast"], quiet=True)
    found = load_evaluation(tmp_path / "e")
    (x, _), (z, labels) = halves
    assert found.result == result and found.folder == tmp_path / "e" and found.ranked == "realism"
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "images.safetensors", "result.json", "scores.safetensors"
    ]  # fmt: skip
    assert torch.equal(found.images["first"], z[first_items(len(z), labels)]) and torch.equal(found.labels, labels)
    assert set(found.scores) == {"realism", "contrast"} and all(s.dtype == torch.float64 for s in found.scores.values())
    assert found.scores["contrast"].mean().item() == pytest.approx(result.values["contrast"], rel=1e-12)
    worst, best = extremes(found.scores)["worst"], extremes(found.scores)["best"]
    assert len(worst) == len(best) == EXTREMES and not set(worst.tolist()) & set(best.tolist())
    assert torch.equal(found.images["worst"], z[worst]) and torch.equal(found.images["best"], z[best])
    realism = found.scores["realism"]
    assert (realism[worst].diff() >= 0).all() and (realism[best].diff() <= 0).all()
    assert realism[worst].max() < realism.median() < realism[best].min()
    assert realism[:9].max() < realism.quantile(0.25)  # noise


def test_values_by_class(halves, tmp_path):
    result = evaluate(*halves, output=tmp_path, metrics=["accuracy", "contrast"], quiet=True)
    assert sorted(result.per_class) == [str(c) for c in range(10)]
    n = {c: v["n_gen"] for c, v in result.per_class.items()}
    assert sum(n.values()) == 898
    for name in ("class_accuracy", "contrast"):
        weighted = sum(n[c] * v[name] for c, v in result.per_class.items()) / 898
        assert weighted == pytest.approx(result.values[name], rel=1e-12)
    (x, y), (z, labels) = halves
    extractor = function_extractor(lambda images: images.flatten(1).float(), 64, "pixels")
    real, fake = (measure(read_images(side), extractor, quiet=True) for side in halves)
    threes = per_class(real, fake, {})["3"]
    want = frechet_distance(x[y == 3].flatten(1).double(), z[labels == 3].flatten(1).double())
    assert threes == {
        "n_gen": int((labels == 3).sum()),
        "n_real": int((y == 3).sum()),
        "frechet_distance": pytest.approx(want, rel=1e-9),
    }


def test_a_class_without_enough_images_has_no_distance(recwarn):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (12, 1, 4, 4), generator=g, dtype=torch.uint8)
    extractor = function_extractor(lambda images: images.flatten(1).float(), 16, "pixels")
    real, fake = (
        measure(read_images((x, torch.tensor(y))), extractor, quiet=True)
        for y in ([0] * 5 + [1] * 6 + [2], [0] * 6 + [2] * 5 + [4])
    )
    found = per_class(real, fake, {"s": torch.arange(12.0)})
    assert {c: set(v) for c, v in found.items()} == {
        "0": {"n_gen", "n_real", "frechet_distance", "s"},
        "2": {"n_gen", "n_real", "s"},
        "4": {"n_gen", "n_real", "s"},
    }
    assert found["4"] == {"n_gen": 1, "n_real": 0, "s": 11} and not recwarn.list


@pytest.mark.filterwarnings("ignore:.*rank deficient")
def test_other_inputs_leave_out_what_they_lack(halves, tmp_path):
    (x, _), (z, _) = halves
    evaluate(None, z[:30], metrics=["contrast"], extractor="none", output=tmp_path / "a", quiet=True)
    found = load_evaluation(tmp_path / "a")
    # It is better neither way, so nothing is worst.
    assert set(found.images) == {"first"} and found.ranked is None and found.labels is None
    assert found.result.per_class == {} and set(found.scores) == {"contrast"}
    evaluate(x[:30], z[:30], metrics=["psnr"], extractor="none", output=tmp_path / "b", quiet=True)
    found = load_evaluation(tmp_path / "b")
    assert found.ranked == "psnr" and len(found.images["worst"]) == 15
    evaluate(x[:3], z[:30], metrics=["frechet"], output=tmp_path / "c", quiet=True)  # too few for realism
    assert set(load_evaluation(tmp_path / "c").images) == {"first"}


def test_a_chosen_realism_is_the_one_that_ranks(halves, tmp_path):
    evaluate(*halves, metrics=[Realism(k=7)], output=tmp_path, quiet=True)
    (x, _), (z, _) = halves
    mine = load_evaluation(tmp_path).scores["realism"]
    assert mine.mean().item() == pytest.approx(load_evaluation(tmp_path).result.values["realism"], rel=1e-12)
    assert load_evaluation(tmp_path).result.protocol.metrics["realism"]["k"] == 7


def test_lower_scores_rank_the_other_way():
    assert ranking_score({"lpips": torch.zeros(1), "dists": torch.zeros(1), "contrast": torch.zeros(1)}) == "dists"
    found = extremes({"lpips": torch.tensor([0.3, 0.1, 0.9, 0.2])})
    assert found["worst"].tolist() == [2, 0] and found["best"].tolist() == [1, 3]
    assert extremes({"contrast": torch.zeros(4)}) == {}


def test_what_was_interrupted_is_not_whole(halves, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no result.json, so no evaluation that was finished"):
        load_evaluation(tmp_path)
    evaluate(None, halves[1][0], metrics=["contrast"], output=tmp_path, quiet=True)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("genkit._files.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(None, halves[1][0], metrics=["contrast"], output=tmp_path, quiet=True)
    assert not (tmp_path / RESULT).exists() and (tmp_path / IMAGES).exists()


def test_other_settings_are_refused_and_the_same_overwritten(halves, tmp_path, monkeypatch):
    def run(**settings):
        return evaluate(None, halves[1], output=tmp_path, quiet=True, **{"metrics": ["accuracy"], **settings})

    first = run(made_with={"steps": 4}, seed=0)
    assert run(made_with={"steps": 4}, seed=0) == first
    before = (tmp_path / RESULT).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("genkit.eval.run.measure", lambda *args, **kwargs: pytest.fail("work had started"))
        for settings, told in (
            ({"made_with": {"steps": 8}}, r"made_with was \{'steps': 4\}, now \{'steps': 8\}"),
            ({"made_with": {"steps": 4}, "seed": 1}, "seed was 0, now 1"),
            (
                {"made_with": {"steps": 4}, "metrics": ["contrast"]},
                "metrics was {'accuracy': {}}, now {'contrast': {}}",
            ),
            ({"made_with": {"steps": 4}, "metrics": ["contrast"], "extractor": "none"}, "extractor was 'digits/"),
        ):
            with pytest.raises(ValueError, match=f"holds an evaluation of other settings .*{told}"):
                run(**settings)
    with pytest.raises(ValueError, match=r"other settings \(n_gen was 898, now 500\)"):
        run(made_with={"steps": 4}, n=500)
    assert (tmp_path / RESULT).read_bytes() == before


def test_others_can_read_the_files(halves, tmp_path):
    evaluate(None, halves[1][0], metrics=["contrast"], output=tmp_path, quiet=True)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # of JSON written by Python, by the umask


def test_the_same_twice_gives_the_same_bytes(halves, tmp_path):
    for name in "ab":
        evaluate(*halves, output=tmp_path / name, metrics=["accuracy"], quiet=True)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_first_images_are_of_all_classes():
    digits = torch.arange(10).repeat_interleave(20)  # sorted, as folders by class are
    items = first_items(200, digits)
    assert digits[items].tolist() == [*range(10)] * 6 + [0, 1, 2, 3] and items[:12].tolist()[::10] == [0, 1]
    many = torch.arange(1000).repeat_interleave(5)
    shown = many[first_items(5000, many)]
    assert len(shown.unique()) == FIRST and shown[:10].max() > 500
    assert torch.equal(first_items(5000, many), first_items(5000, many.clone()))
    assert first_items(5, torch.tensor([2, 2, 1, 2, 1])).tolist() == [2, 0, 4, 1, 3]
    assert torch.equal(first_items(200, None), torch.arange(FIRST))
