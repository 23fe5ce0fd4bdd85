"""The scripts for a GPU, each by itself where there is none: on tiny inputs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_everything_in_one_table(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), "--device", "cpu", "--output", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    named = " ".join(row["what"] for row in rows)
    for what in (
        "training LSD",
        "error of the tangent",
        "backward of both",
        "mean_flow: step",
        "nearest of",
        "loop over fused",
        "gradients of queries",
    ):
        assert what in named, named
    assert not [row for row in rows if row["holds"] is False] and all(row["value"] is not None for row in rows)


def test_a_part_that_breaks_does_not_hide_the_others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks/gpu")
    import _measure

    def broken():
        yield _measure.Row("first", 1.0, "x", 0.5)
        raise MemoryError("of no use")

    file, end = tmp_path / "rows.json", ["--device", "cpu", "--output", str(tmp_path / "rows.json")]
    parts = [("a part", broken), ("another", lambda: [_measure.Row("second", 2.0, "x", 1.0)])]
    monkeypatch.setattr(sys, "argv", ["script", *end])
    assert _measure.main("parts", "", lambda device: _measure.sections(parts)) == 1
    record = json.loads(file.read_text())
    assert record["complete"] and [(row["what"], row["holds"]) for row in record["rows"]] == [
        ("first", True),
        ("a part: broke off", False),
        ("second", True),
    ]
    assert "of no use" in record["rows"][1]["note"]
    monkeypatch.setattr(sys, "argv", ["script", *end, "--seconds", "0"])
    assert _measure.main("parts", "", lambda device: _measure.sections(parts)) == 1
    rows = json.loads(file.read_text())["rows"]
    assert [row["what"] for row in rows] == ["first", "parts: everything was measured"] and rows[1]["holds"] is False


def test_without_a_gpu_they_say_so(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu/attention.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    import torch

    if not torch.cuda.is_available():
        assert done.returncode == 2 and "no CUDA device here; --device cpu runs" in done.stderr
