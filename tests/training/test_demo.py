"""The demo from end to end, with networks too small to draw anything."""

import json
import re
import subprocess
import sys

import pytest

from genkit.training import demo

SMALL = {
    "teacher": ["model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "max_train_steps=2"],
    "student": ["max_train_steps=2"],
}
for settings in SMALL.values():
    settings += ["lr_warmup_steps=1", "sampling.every=null", "global_batch_size=8"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    report = demo.run(folder, quiet=True, overrides=SMALL)
    assert report == folder / "report.html"
    return folder


def test_results_hold_every_figure(output):
    results = json.loads((output / "results.json").read_text())
    rows = {row["key"]: row for row in results["rows"]}
    assert set(rows) == {s.key for s in demo.SETTINGS} and len(rows) == 12
    calls = {
        "teacher-1": 1,
        "teacher-32": 32,
        "student-1": 1,
        "student-4": 4,
        "teacher-8-cfg": 16,
        "teacher-32-apg": 64,
    }
    assert {key: rows[key]["network_calls"] for key in calls} == calls
    for row in rows.values():
        assert row["frechet_distance"] > 0 and 0 <= row["class_accuracy"] <= 1 and 0 <= row["recall"] <= 1
    assert 3 < results["real_halves_frechet_distance"] < 6
    assert results["protocol"]["n_real"] == results["protocol"]["n_gen"] == 1797
    assert set(results["ratios"]) == set(results["targets"])


def test_report_is_one_file_that_needs_no_network(output):
    text = (output / "report.html").read_text()
    for row in json.loads((output / "results.json").read_text())["rows"]:
        assert demo.Setting(row["model"], row["steps"], row["guider"]).title in text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    assert text.count("data:image/png") == 7 and text.count("data:image/svg") == 1
    assert "Why guidance raises the distance here" in text


def test_the_printed_lines_load_the_student(output):
    code = "import diffusers; diffusers.utils.logging.disable_progress_bar()\n" + demo.load_lines(output)
    out = subprocess.run([sys.executable, "-c", code + "\nprint(len(images))"], capture_output=True, text=True)
    assert out.stdout.strip() == "10", out.stderr
    for name in ("teacher", "student"):
        card = (output / name / "pipeline" / "README.md").read_text()
        assert f"Handwritten digits: {name}" in card and "frechet_distance (1 steps)" in card


def test_a_second_run_reuses_what_is_there_and_redoes_what_is_not(output, monkeypatch):
    before = json.loads((output / "results.json").read_text())["rows"]
    (output / "samples" / "student-2.json").unlink()
    made = []
    evaluate = demo.evaluate
    monkeypatch.setattr(demo, "evaluate", lambda *a, **k: made.append(1) or evaluate(*a, **k))
    monkeypatch.setattr(demo, "train", lambda *a, **k: pytest.fail("both models are there"))
    demo.run(output, quiet=True, overrides=SMALL)
    assert len(made) == 1
    assert json.loads((output / "results.json").read_text())["rows"] == before


def test_fresh_deletes_a_demo_and_nothing_else(output, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no earlier demo"):
        demo.run(tmp_path, fresh=True, quiet=True)
    assert (tmp_path / "thesis.txt").is_file()
    demo._clear(output)
    assert not output.exists()
