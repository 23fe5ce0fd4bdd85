"""A sweep's cells: each measured as by hand, once, whatever happens in between."""

import csv
import importlib.util
import io
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm
from typer.testing import CliRunner

from genkit import cli
from genkit.eval import generated, sweep_progress
from genkit.eval.asked import matched
from genkit.eval.generated import generated_images
from genkit.eval.inputs import drawn, read_images
from genkit.eval.result import Result
from genkit.eval.run import evaluate, measure
from genkit.eval.sweep import Sweep, main
from genkit.pipelines.commands import load_pipeline

_spec = importlib.util.spec_from_file_location("sweeping", Path(__file__).with_name("sweeping.py"))
sweeping = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweeping)

RANKED = "frechet_distance:min,coverage:max"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sweeping.save_model(tmp_path_factory.mktemp("sweep") / "tiny")


def run(model, output, reference="digits", *, steps="1,2", guidance="1,3", **settings):
    settings = {"n": 40, "batch_size": 16, "device": "cpu", "quiet": True, **settings}
    return main(str(model), reference, output, steps=steps, guidance=guidance, **settings)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A sweep of four cells, never interrupted."""
    output = tmp_path_factory.mktemp("whole") / "sweep"
    run(model, output)
    return output


@pytest.fixture
def made(monkeypatch):
    """The images that networks are asked for, a list a batch."""
    asked, make = [], generated.Model.make

    def counted(self, items):
        asked.append(list(items))
        return make(self, items)

    monkeypatch.setattr(generated.Model, "make", counted)
    return asked


def test_a_cell_is_what_evaluating_by_hand_gives(model, whole):
    folders = {
        (r.made_with["steps"], r.made_with["guider"]): r for r in map(Result.load, whole.glob("cells/*/result.json"))
    }
    assert set(folders) == {(1, "none"), (2, "none"), (1, "cfg"), (2, "cfg")}
    reference = drawn(read_images("digits"), 40, 0, "reference")
    images = generated_images(
        load_pipeline(model), matched(reference), num_inference_steps=2, guider="cfg:guidance_scale=3", batch_size=16
    )
    by_hand = evaluate(reference, images, extractor="digits", batch_size=16, quiet=True)
    cell = folders[2, "cfg"]
    assert cell.values == by_hand.values and (cell.nfe, by_hand.nfe) == (4, 4)
    assert cell.protocol.matched == "labels" and (cell.protocol.n_real, cell.protocol.n_gen) == (40, 40)
    assert {k: r.nfe for k, r in folders.items()} == {(1, "none"): 1, (2, "none"): 2, (1, "cfg"): 2, (2, "cfg"): 4}
    told = {"model": "tiny", "steps": 2, "guidance_scale": 3, "guider": "cfg", "seed": 0}
    assert cell.made_with == told | {"scheduler": "FlowMatchEulerDiscreteScheduler"}


def test_the_table_has_a_row_a_cell(whole):
    rows = json.loads((whole / "results.json").read_text())["rows"]
    with (whole / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(r["guider"], r["steps"]) for r in rows] == [("cfg", 1), ("cfg", 2), ("none", 1), ("none", 2)]
    assert len(lines) == 4 and json.loads(lines[0]["protocol"])["extractor"].startswith("digits")
    assert [float(line["frechet_distance"]) for line in lines] == [row["frechet_distance"] for row in rows]


def test_what_is_there_is_not_made_again_and_axes_grow(model, whole, tmp_path, made):
    import shutil

    output = tmp_path / "sweep"
    shutil.copytree(whole, output)
    before = files(output)
    run(model, output)
    assert not made and files(output) == before
    found = run(model, output, steps="1,3", guider="cfg,apg")
    # Cells of 1 step with cfg and without are there; 3 steps without, with cfg and with apg, and 1 with apg, are not.
    assert sorted(i for batch in made for i in batch) == sorted(4 * list(range(40)))
    assert len(found["rows"]) == 8 and {k: v for k, v in files(output).items() if k in before and "cells" in k} == {
        k: v for k, v in before.items() if "cells" in k
    }


def test_the_reference_is_measured_once(model, whole, tmp_path, monkeypatch):
    import shutil

    output = tmp_path / "sweep"
    shutil.copytree(whole, output)
    shutil.rmtree(next(output.glob("cells/*")))
    calls = []
    monkeypatch.setattr("genkit.eval.sweep_folder.measure", lambda *a, **k: calls.append(a) or measure(*a, **k))
    run(model, output)
    assert not calls and files(output) == files(whole)


def test_the_same_sweep_gives_the_same_bytes(model, whole, tmp_path):
    state = torch.random.get_rng_state()
    run(model, tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert files(tmp_path / "again") == files(whole)


def _killed(model, output, after):
    """Kills itself at a batch of its own choice, or when it is told to."""
    make, count = generated.Model.make, 0

    def fatal(self, items):
        nonlocal count
        count += 1
        if count == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, items)

    generated.Model.make = fatal
    run(model, output)


@pytest.mark.parametrize("batches", [1, 5])
def test_a_killed_sweep_goes_on(model, whole, tmp_path, made, batches):
    """5: in the second cell, of three batches each."""
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(model, tmp_path / "sweep", batches))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = len(list(tmp_path.glob("sweep/cells/*/result.json")))
    assert done == (batches - 1) // 3
    run(model, tmp_path / "sweep")
    assert sum(map(len, made)) == (4 - done) * 40
    assert files(tmp_path / "sweep") == files(whole)


def _killed_at(model, output, event):
    """Kills itself at one of the moments at which what is on the disk is about to change, or has just done so."""
    count = 0

    def fatal(function):
        def counted(*args, **kwargs):
            nonlocal count
            for before in (True, False):
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                if before:
                    found = function(*args, **kwargs)
            return found

        return counted

    generated.Model.make, os.replace = fatal(generated.Model.make), fatal(os.replace)
    Path.unlink, Path.mkdir = fatal(Path.unlink), fatal(Path.mkdir)
    run(model, output)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_sweep_killed_again_and_again_loses_and_doubles_nothing(model, whole, tmp_path, first):
    """Each time one, two ... moments later than before, so that every stage is hit, and each goes a little further."""
    event, codes = first, []
    while not codes or codes[-1] != 0:
        process = multiprocessing.get_context("fork").Process(
            target=_killed_at, args=(model, tmp_path / "sweep", event)
        )
        process.start()
        process.join()
        codes.append(process.exitcode)
        event += 3
    assert len(codes) > 4 and set(codes[:-1]) == {-signal.SIGKILL}
    assert files(tmp_path / "sweep") == files(whole)


REFUSED = [
    (dict(steps="1,two"), "steps='two': expected whole numbers"),
    (dict(steps="0"), "steps=0: must be at least 1"),
    (dict(guidance="1,x"), "guidance='x': expected numbers"),
    (dict(guider="cgf"), "did you mean 'cfg'"),
    (dict(scheduler="ddimm"), "scheduler='ddimm' is not known"),
    (dict(metrics=["fidd"]), "metrics='fidd' is not known"),
    (dict(metrics=["psnr"]), "'psnr' pairs image i with image i"),
    (dict(metrics=["cmmd"], extractor="none"), "'cmmd' needs"),
    (dict(extractor="digit"), "extractor='digit' is not known"),
    (dict(n=2000), "has 1797 images, 2000 are needed"),
    (dict(n=1), "n=1: must be at least 2"),
    (dict(intervals=1), "intervals=1"),
    (dict(batch_size=0), "batch_size=0"),
    (dict(dtype="float8"), "dtype='float8'"),
    (dict(arguments="guidance_scale=3"), "guidance_scale is an axis"),
    (dict(arguments="heigth=8"), "'heigth' is not known"),
    (dict(crop="squash"), "crop='squash' has no effect without size"),
    (dict(mmhm="mine"), "expected NAME:min or NAME:max"),
    (dict(json_path=Path("/nowhere/table.json")), "the folder /nowhere does not exist"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_refused_before_the_network_is_called(model, tmp_path, made, settings, words):
    with pytest.raises(ValueError) as error:
        run(model, tmp_path / "sweep", **settings)
    assert words in str(error.value) and not made and not (tmp_path / "sweep").exists()


def test_missing_models_and_references_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        run(tmp_path / "none", tmp_path / "sweep")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        run(model, tmp_path / "sweep", str(tmp_path / "none"))


def test_other_settings_are_refused_by_name(model, whole, made, tmp_path):
    before = files(whole)
    for settings, words in (
        (dict(seed=1), "seed was 0, now 1"),
        (dict(n=30), "n was 40, now 30"),
        (dict(metrics=["frechet"]), "metrics was"),
        (dict(extractor="none", metrics=["saturation"]), "extractor was 'digits"),
        (dict(intervals=5), "intervals was None, now 5"),
    ):
        with pytest.raises(ValueError, match="holds a sweep with other settings") as error:
            run(model, whole, **settings)
        assert words in str(error.value)
    other = sweeping.save_model(tmp_path / "tiny")
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match="weights was"):
        run(other, whole)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no settings.json"):
        run(model, tmp_path / "other")
    assert not made and files(whole) == before


def test_statistics_without_labels_ask_for_every_class_equally(model, tmp_path):
    from genkit.eval.extractors.base import get_extractor

    reference = drawn(read_images("digits"), 60, 3, "reference")
    measure(reference, get_extractor("digits"), quiet=True).stats.save(tmp_path / "real.npz")
    run(model, tmp_path / "sweep", str(tmp_path / "real.npz"), steps="1", guidance="1", n=60)
    (path,) = tmp_path.glob("sweep/cells/*/result.json")
    result = Result.load(path)
    assert (result.protocol.n_real, result.protocol.n_gen, result.protocol.matched) == (60, 60, None)
    assert result.values.keys() >= {"frechet_distance"} and "class_accuracy" in result.values


def test_prompts_of_a_folder_are_asked_for_at_its_size(tiny_pipeline, tmp_path):
    tiny_pipeline("sd15").save_pretrained(tmp_path / "model")
    (tmp_path / "real").mkdir()
    rows = [{"file_name": f"{i}.png", "text": ["a cat", "a dog"][i % 2]} for i in range(4)]
    for i, row in enumerate(rows):
        Image.new("RGB", (20, 24), (40 * i, 90, 10)).save(tmp_path / "real" / row["file_name"])
    (tmp_path / "real" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"n": None, "size": 16, "metrics": ["contrast"], "extractor": "none"}
    found = run(tmp_path / "model", tmp_path / "sweep", str(tmp_path / "real"), steps="1", guidance="4", **settings)
    (row,) = found["rows"]
    assert (row["protocol"]["matched"], row["protocol"]["n_gen"], row["nfe"]) == ("prompts", 4, 2)
    assert "16x16" in row["protocol"]["reference_images"] and "16x16" in row["protocol"]["generated_images"]


def test_a_cell_without_images_is_named_and_tried_again(model, tmp_path, monkeypatch):
    make = generated.Model.make

    def broken(self, items):
        images, bad = make(self, items)
        return images, {row: "is NaN" for row in range(len(items))} if self.made_with["steps"] == 2 else bad

    monkeypatch.setattr(generated.Model, "make", broken)
    with pytest.raises(ValueError, match=r"1 cells have no result, and will be tried again: 2-steps-none.*40 of 40"):
        run(model, tmp_path / "sweep", guidance="1")
    assert len(json.loads((tmp_path / "sweep" / "results.json").read_text())["rows"]) == 1
    monkeypatch.setattr(generated.Model, "make", make)
    assert len(run(model, tmp_path / "sweep", guidance="1")["rows"]) == 2


def test_cells_that_lost_images_are_not_ranked_with_others_unless_forced(model, tmp_path, monkeypatch):
    make = generated.Model.make

    def broken(self, items):
        images, bad = make(self, items)
        return images, {0: "is NaN"} if self.made_with["steps"] == 2 and items[0] == 0 else bad

    monkeypatch.setattr(generated.Model, "make", broken)
    found = run(model, tmp_path / "sweep", guidance="1", mmhm=RANKED)
    assert "n_gen: " in found["notes"][0] and "mmhm" not in found["rows"][0]
    found = run(model, tmp_path / "sweep", guidance="1", mmhm=RANKED, force=True)
    assert "n_gen" in found["forced"] and found["rows"][0]["mmhm_forced"]
    with pytest.raises(ValueError, match="is NaN"):
        run(model, tmp_path / "strict", guidance="1", strict=True)


def test_ranking_or_what_it_lacks(model, whole):
    advice = run(model, whole)["notes"][0]
    assert all(word in advice for word in ("--extractor inception", "reward:pick_score", "--mmhm"))
    found = run(model, whole, mmhm=RANKED)
    assert found["rows"][0]["mmhm_rank"] == 1 and found["bounds"].keys() == {"frechet_distance", "coverage"}
    assert "no column fid; there are" in run(model, whole, mmhm="fid,coverage:max")["notes"][0]


def test_the_bar_counts_every_image_and_tells_the_time_left(model, tmp_path, monkeypatch):
    shown = io.StringIO()

    class Shown(tqdm):
        def __init__(self, **settings):
            super().__init__(**{**settings, "file": shown, "mininterval": 0, "ncols": 200, "disable": False})

    monkeypatch.setattr(sweep_progress, "tqdm", Shown)
    sweeper = Sweep(model, "digits", tmp_path / "sweep", n=40, batch_size=16, quiet=True)
    sweeper.run(steps=[1, 2], guidance=[1.0, 3.0])
    text = shown.getvalue()
    assert "160/160 images" in text and "2-steps-cfg-3" in text and "left" in text
    assert "0/160" in text and "40/160" in text and "161/160" not in text


def test_the_command(model, tmp_path):
    call = f"eval sweep {model} digits --output {tmp_path / 'sweep'} --steps 1,2 --guidance 1,2 --guider cfg -n 30"
    call += f" --csv {tmp_path / 'a.csv'} --json {tmp_path / 'a.json'} --html {tmp_path / 'a.html'} --mmhm {RANKED}"
    call += " --intervals 4 --metrics frechet,prdc --set eta=None --device cpu"
    done = CliRunner().invoke(cli.app, call.split())
    assert done.exit_code == 0, done.output
    assert "MMHM" in done.output and "stability" in done.output
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 4 and (tmp_path / "a.csv").read_bytes() == (tmp_path / "sweep" / "results.csv").read_bytes()
    assert "<html" in (tmp_path / "a.html").read_text()
    assert Result.load(next(tmp_path.glob("sweep/cells/*/result.json"))).intervals
