"""The example of score distillation, on a tiny Stable Diffusion 1.5."""

import runpy
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "score_distillation.py"


@pytest.mark.parametrize("method", ["sds", "csd", "vsd"])
def test_runs_and_follows_the_prompt(method, tiny_pipeline, tmp_path, monkeypatch):
    tiny_pipeline("sd15").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main, images = runpy.run_path(str(SCRIPT))["main"], {}
    for prompt in ("a cat", "a dog in the rain"):
        output = tmp_path / f"{len(prompt)}.png"
        given = ["--model", str(tmp_path / "model"), "--output", str(output), "--steps", "4", "--size", "32"]
        main([*given, "--method", method, "--prompt", prompt, "--learning-rate", "0.3"])
        images[prompt] = numpy.asarray(Image.open(output), dtype=float)
    first, second = images.values()
    assert first.shape == (32, 32, 3) and numpy.abs(first - second).max() > 0
