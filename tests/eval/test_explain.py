import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from genkit import cli
from genkit.eval.explain import PARTS, QUALITIES, explain, main
from genkit.eval.extractors import inception
from genkit.eval.extractors._resized import ResizedExtractor
from genkit.eval.extractors.base import Features
from genkit.eval.inputs import read_images
from genkit.eval.resize import RULES
from genkit.eval.run import evaluate


class StandIn(ResizedExtractor):
    """Means and spreads of four corners of a 16 x 16 image."""

    usual = "tf1"
    dim = 24

    def __init__(self, resize="tf1"):
        super().__init__(
            nn.AdaptiveAvgPool2d(2), name="stand-in", weights="none", distance="fid", size=16, resize=resize
        )

    def see(self, pixels):
        means = self.network(pixels)
        spreads = self.network((pixels - nn.functional.interpolate(means, (16, 16))).abs())
        return Features(torch.cat([means, spreads], 1).flatten(1) / 16)


def noise(n, seed, low=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (n, 3, 40, 40), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def sides():
    return noise(120, 0), noise(100, 1, low=30)


@pytest.fixture(scope="module")
def found(sides):
    return explain(*sides, extractor=StandIn(), quiet=True)


def value(found, choice, name):
    return next(row.value for row in found.rows if (row.choice, row.name) == (choice, name))


def test_rules_are_what_eval_run_gives(found, sides):
    assert (found.rows[0].choice, found.rows[0].name) == ("resize", "tf1")
    assert found.rows[0].difference == found.rows[0].percent == 0
    for rule in RULES:
        result = evaluate(*sides, extractor=StandIn(rule), metrics=["frechet"], quiet=True)
        wanted = result.values["fid" if rule == "tf1" else f"fid[{rule}]"]
        assert value(found, "resize", rule) == pytest.approx(wanted, rel=1e-12)
    for row in found.rows:
        assert row.difference == row.value - found.rows[0].value
        assert row.percent == pytest.approx(100 * row.difference / found.rows[0].value)
    assert (found.extractor, found.distance) == ("stand-in/tf1/none", "fid")
    assert (found.n_real, found.n_gen) == (120, 100)
    clean, pil, tf1 = (value(found, "resize", rule) for rule in ("clean", "pil", "tf1"))
    assert 0 < abs(pil - clean) < abs(tf1 - clean) / 5  # rounding alone, against aliasing


@pytest.mark.parametrize("quality", QUALITIES)
def test_jpeg_is_of_the_generated_images(found, sides, tmp_path, quality):
    for i, image in enumerate(sides[1]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:03}.jpg", quality=quality)
    saved = evaluate(sides[0], tmp_path, extractor=StandIn(), metrics=["frechet"], quiet=True)
    made = value(found, "jpeg", f"quality {quality}")
    assert made == pytest.approx(saved.values["fid"], rel=1e-9) and made != found.rows[0].value


def test_fewer_images_are_further_apart():
    found = explain(noise(128, 0), noise(128, 2), extractor=StandIn(), rules=[], quiet=True)
    whole, half, quarter = (row.value for row in found.rows if row.choice != "jpeg")
    # Of one law: the whole distance is bias, of the order of 1 / n.
    assert half / whole == pytest.approx(2, rel=0.3) and quarter / half == pytest.approx(2, rel=0.3)
    assert [row.name for row in found.rows if row.choice == "images"] == [f"n / {parts}" for parts in PARTS]


def test_two_values(sides, found):
    gap = value(found, "resize", "antialias") - value(found, "resize", "pytorch")
    told = explain(*sides, extractor=StandIn(), values=(5 + gap + 1e-6, 5.0), quiet=True)
    best = told.pairs[0]
    assert (best.first, best.second) == ("antialias", "pytorch")
    assert best.explained == pytest.approx(gap, rel=1e-9) and best.unexplained == pytest.approx(1e-6, rel=1e-3)
    left = [abs(pair.unexplained) for pair in told.pairs]
    assert left == sorted(left)
    rules, others = len(RULES), len(QUALITIES) + len(PARTS)
    assert len(told.pairs) == rules * (rules - 1) + 2 * others  # one choice at a time
    assert told.rows == found.rows and not found.pairs


def test_draws_and_random_state(sides):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (explain(*sides, extractor=StandIn(), rules=["clean"], n=40, quiet=True) for _ in range(2))
    assert first.model_dump_json() == second.model_dump_json()
    assert first.n_real == first.n_gen == 40
    result = evaluate(*sides, extractor=StandIn(), metrics=["frechet"], n=40, quiet=True)
    assert first.rows[0].value == pytest.approx(result.values["fid"], rel=1e-12)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_few_and_grey_images_and_equal_sets():
    grey = noise(20, 3)[:, :1]
    found = explain(grey, grey, extractor=StandIn(), rules=["clean", "clean"], quiet=True)
    assert [row.name for row in found.rows if row.choice == "resize"] == ["tf1", "clean"]
    assert any("fewer images (20) than feature dimensions (24)" in note for note in found.notes)
    assert found.rows[0].value == pytest.approx(0, abs=1e-9)


def test_an_unreadable_image_is_counted(tmp_path, sides):
    for i, image in enumerate(sides[1][:40]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:03}.png")
    file = tmp_path / "007.png"
    file.write_bytes(file.read_bytes()[:-100])
    found = explain(sides[0], tmp_path, extractor=StandIn(), rules=["clean"], quiet=True)
    assert found.n_gen == 39 and any("007.png" in note for note in found.notes)


def test_what_is_refused(sides):
    with pytest.raises(ValueError, match="extractor='digits' has no setting resize; accepted are clip, dinov2, incep"):
        explain(*sides, extractor="digits")
    with pytest.raises(ValueError, match="rules='tf2' is not known; did you mean 'tf1'"):
        explain(*sides, extractor=StandIn(), rules=["tf2"])
    with pytest.raises(ValueError, match=r"values=\(nan, 1.0\): expected two finite numbers"):
        explain(*sides, extractor=StandIn(), values=(float("nan"), 1.0))
    with pytest.raises(ValueError, match="n=500: reference set 'tensor' has 120 images"):
        explain(*sides, extractor=StandIn(), n=500)
    with pytest.raises(ValueError, match="n=1: reference set"):
        explain(*sides, extractor=StandIn(), n=1)
    with pytest.raises(ValueError, match="values='3': expected two numbers X,Y"):
        main("a.npz", "b.npz", values="3")


@pytest.fixture
def files(tmp_path, sides):
    for name, side in zip("ab", sides, strict=True):
        np.savez(tmp_path / f"{name}.npz", images=side[:40].numpy())
    return [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]


def test_command(files, tmp_path, monkeypatch):
    monkeypatch.setattr("genkit.eval.explain.get_extractor", lambda name: StandIn())
    options = ["--rules", "tf1,clean", "--values", "3.5,3", "--json", str(tmp_path / "out.json")]
    outcome = CliRunner().invoke(cli.app, ["eval", "doctor", *files, *options], catch_exceptions=False)
    assert outcome.exit_code == 0
    assert all(
        text in outcome.output
        for text in ("fid: b.npz against a.npz", "tf1", "clean", "3.5 - 3", "unexplained", " %)", "suspicion")
    )
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in written["rows"][:2]] == ["tf1", "clean"]
    monkeypatch.setattr("genkit.eval.explain.get_extractor", lambda name: StandIn("clean"))
    outcome = CliRunner().invoke(cli.app, ["eval", "doctor", *files], catch_exceptions=False)
    assert "fid[clean]: b.npz against a.npz" in outcome.output
    quiet = CliRunner().invoke(cli.app, ["eval", "doctor", *files, "--rules", "clean", "--quiet"])
    assert quiet.exit_code == 0 and not quiet.output
    assert read_images(files[0]).n == 40


def test_inception_by_default(files, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=inception.NAMES[0]):
        main(*files)
    with pytest.raises(ValueError, match="absent does not exist"):
        main(*files, json_path=tmp_path / "absent" / "out.json")


def test_help_names_every_extractor():
    from genkit.cli.evaluation import EXTRACTORS
    from genkit.eval.extractors.base import Extractor
    from genkit.registry import file_names, members

    assert EXTRACTORS == ", ".join(file_names("genkit.eval.extractors"))
    assert file_names("genkit.eval.extractors") == sorted(members("genkit.eval.extractors", Extractor))
