"""Checkpoints evaluated beside a training: each once, with averaged weights, whatever comes and goes meanwhile."""

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from genkit import cli
from genkit.eval.run import evaluate
from genkit.training import checkpoint, watch
from genkit.training.watch import BEST, FILE, Watch


@pytest.fixture(scope="module")
def trained(toys, tmp_path_factory):
    """A run of 4 steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    toys.run(toys.digits(folder, max_train_steps=4, checkpointing_steps=2))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def rows(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def look(folder, **settings):
    return Watch(folder, "digits", **{"n": 30, "steps": [1, 2], **settings})


def test_every_checkpoint_once_at_every_number_of_steps(folder):
    state = torch.random.get_rng_state()
    new = look(folder).once()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [(r["step"], r["num_inference_steps"], r["nfe"]) for r in new] == [
        (2, 1, 1),
        (2, 2, 2),
        (4, 1, 1),
        (4, 2, 2),
    ]
    assert new == rows(folder) and new[0]["protocol"]["matched"] == "labels"
    assert new[0]["values"] != new[2]["values"] and new[0]["made_with"]["training_step"] == 2
    assert look(folder).once() == [] and rows(folder) == new
    extended = look(folder, steps=[1, 3]).once()
    assert [(r["step"], r["num_inference_steps"]) for r in extended] == [(2, 3), (4, 3)]


def test_the_images_are_those_of_the_averaged_weights(folder, toys):
    """Against the trainer's own: its student, averaged, drawing the same items."""
    from genkit.eval.asked import matched
    from genkit.eval.inputs import drawn, read_images
    from genkit.training.student_images import student_images

    trainer = toys.digits(folder, max_train_steps=4, resume="latest")
    asked = matched(drawn(read_images("digits"), 30, 0, "reference"))
    with trainer.averaged():
        images = student_images(trainer.run, asked, 2, seed=0, batch_size=64, device=torch.device("cpu"), name="x")
        values = evaluate(drawn(read_images("digits"), 30, 0, "reference"), images, batch_size=64, quiet=True).values
    assert look(folder, steps=[2]).once()[-1]["values"] == values
    raw = load_file(folder / "checkpoint-4" / "student.safetensors")
    average = load_file(folder / "checkpoint-4" / "student.ema.safetensors")
    assert any(not torch.equal(raw[name], average[f"0.9/{name}"]) for name in raw if f"0.9/{name}" in average)


def test_the_best_is_noted(folder):
    look(folder, best="coverage").once()
    found = json.loads((folder / BEST).read_text())
    values = {(r["checkpoint"], r["num_inference_steps"]): r["values"]["coverage"] for r in rows(folder)}
    assert found["metric"] == "coverage" and found["value"] == max(values.values())
    assert values[found["checkpoint"], found["num_inference_steps"]] == found["value"]
    (folder / FILE).unlink()
    look(folder).once()
    found = json.loads((folder / BEST).read_text())
    assert found["metric"] == "class_accuracy" or found["value"] == min(
        r["values"][found["metric"]] for r in rows(folder)
    )


def test_a_half_written_line_is_cut_off_and_its_checkpoint_evaluated_again(folder):
    whole = look(folder).once()
    text = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(text[:-50])
    assert look(folder).once() == whole[-1:] and (folder / FILE).read_bytes() == text


def test_what_is_being_written_or_was_deleted_is_left_out(folder, monkeypatch, caplog):
    (folder / "checkpoint-3").mkdir()  # no manifest yet
    (folder / ".writing-checkpoint-5").mkdir()
    loaded, load = [], watch.load_student

    def vanishing(run, path):
        if path.name == "checkpoint-2":
            shutil.rmtree(path)  # pruned, between being found and being read
        loaded.append(path.name)
        load(run, path)

    monkeypatch.setattr(watch, "load_student", vanishing)
    new = look(folder, steps=[1]).once()
    assert [r["step"] for r in new] == [4] and loaded == ["checkpoint-2", "checkpoint-4"]
    assert "checkpoint-2 is left out" in caplog.text


def test_a_truncated_checkpoint_that_stays_is_an_error(folder):
    file = folder / "checkpoint-2" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(Exception, match="(?i)header|deserializing"):
        look(folder).once()


def test_a_diverged_checkpoint_is_a_row_without_values(folder):
    for name in ("student", "student.ema"):
        file = folder / "checkpoint-2" / f"{name}.safetensors"
        save_file({k: torch.full_like(v, float("nan")) for k, v in load_file(file).items()}, file)
    new = look(folder, steps=[1]).once()
    assert new[0]["values"] == {} and "30 of 30 images" in new[0]["notes"][0] and new[1]["values"]
    assert look(folder, steps=[1]).once() == [] and json.loads((folder / BEST).read_text())["step"] == 4


def test_it_follows_a_training_to_its_end(toys, tmp_path):
    """The training writes its checkpoints while it is watched, prunes them, and ends."""
    trainer = toys.digits(tmp_path / "run", max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=2)
    steps = trainer.steps()
    next(steps), next(steps)
    follower = look(tmp_path / "run", steps=[1])
    assert not follower.finished()
    thread = threading.Thread(target=follower.follow, args=(0.02,))
    thread.start()
    deadline = threading.Event()
    while not (tmp_path / "run" / FILE).exists() and not deadline.wait(0.02):
        assert thread.is_alive()
    for _ in steps:
        pass
    thread.join(60)
    assert not thread.is_alive() and follower.finished()
    assert {2, 6} <= {r["step"] for r in rows(tmp_path / "run")} <= {2, 4, 6}


def test_a_run_that_ended_early_is_known_by_what_it_exported(folder):
    shutil.rmtree(folder / "checkpoint-4")
    follower = look(folder, steps=[1])
    assert not follower.finished()
    (folder / "pipeline").mkdir()
    assert follower.finished()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(steps=[0]), "steps=0: must be at least 1"),
        (dict(n=1), "n=1: must be at least 2"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(extractor="digit"), "extractor='digit' is not known"),
        (dict(metrics=["fidd"]), "metrics='fidd' is not known"),
        (dict(best="beauty"), "best='beauty'"),
        (dict(n=2000), "2000 are needed"),
    ],
)
def test_bad_settings_are_refused(folder, settings, words):
    with pytest.raises(ValueError) as error:
        look(folder, **settings)
    assert words in str(error.value)


def test_other_settings_do_not_mix(folder):
    look(folder, steps=[1]).once()
    with pytest.raises(ValueError, match="n was 30, now 40"):
        look(folder, n=40)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        look(folder / "none")


def test_labels_that_the_student_lacks_are_refused(folder):
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="takes class labels"):
        Watch(folder, images, steps=[1], metrics=["saturation"]).once()
    with pytest.raises(ValueError, match="labels 0 to 19"):
        Watch(folder, (images, torch.arange(20)), steps=[1], metrics=["saturation"]).once()


def test_the_command(folder):
    call = f"eval watch {folder} digits --once --steps 1 -n 30 --best frechet_distance --device cpu"
    done = CliRunner().invoke(cli.app, call.split())
    assert done.exit_code == 0 and "frechet_distance" in done.output, done.output
    best = json.loads((folder / BEST).read_text())
    told = f"best: frechet_distance {best['value']:.5g} of {best['checkpoint']}, 1 inference steps ("
    assert told in done.output.replace("\n", " ")
    assert len(rows(folder)) == len(checkpoint.found(folder)) == 2
    done = CliRunner().invoke(cli.app, f"eval watch {folder} digits --steps 1 -n 30 --poll 0.1 --quiet".split())
    assert done.exit_code == 0 and len(rows(folder)) == 2
    (folder / "empty").mkdir()
    none = CliRunner().invoke(cli.app, f"eval watch {folder / 'empty'} digits --once -n 30".split())
    assert none.exit_code != 0 and "no checkpoint-N below; accepted is the output_dir" in str(none.exception)


def test_notes_are_logged_once(folder, caplog):
    caplog.set_level("INFO", "genkit.training")
    new = look(folder, steps=[1]).once()
    notes = set(new[0]["notes"])
    assert notes and len(new) == 2 and notes == set(new[1]["notes"])
    told = [record.getMessage() for record in caplog.records]
    assert all(told.count(f"note: {note}") == 1 for note in notes)
