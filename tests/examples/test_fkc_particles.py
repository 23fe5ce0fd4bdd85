"""The example that the README shows, on a tiny SDXL."""

import runpy
from pathlib import Path

import torch
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "fkc_particles.py"


def test_runs_weighs_and_chooses(tiny_pipeline, tmp_path, monkeypatch, capsys):
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main = runpy.run_path(str(SCRIPT))["main"]
    given = ["--model", str(tmp_path / "model"), "--steps", "6", "--output", str(tmp_path / "particles.png")]
    main([*given, "--particles", "8", "--guidance-scale", "7"])
    assert Image.open(tmp_path / "particles.png").size == (8 * 32, 32)
    weights, log_z, sizes = capsys.readouterr().out.splitlines()[-3:]
    numbers = [float(v) for v in weights.removeprefix("weights [").rstrip("]").split(",")]
    assert len(numbers) == 8 and abs(sum(numbers) - 1) < 0.01 and max(numbers) > 0.13
    assert log_z.startswith("log Z ") and int(log_z.split()[-1]) in range(8)
    assert len(sizes.split(",")) == 6
    main([*given, "--particles", "2", "--guidance-scale", "1"])
    assert capsys.readouterr().out.splitlines()[-3] == "weights [0.5, 0.5]"
