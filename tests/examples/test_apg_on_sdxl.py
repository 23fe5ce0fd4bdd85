"""The example that the README shows, on a tiny SDXL."""

import runpy
from pathlib import Path

import numpy
import torch
from PIL import Image

from genkit.guidance import APG, guided

SCRIPT = Path(__file__).parents[2] / "examples" / "apg_on_sdxl.py"


def test_runs_and_guides(tiny_pipeline, tmp_path, monkeypatch):
    pipe = tiny_pipeline("sdxl")
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main, images = runpy.run_path(str(SCRIPT))["main"], {}
    for scale in (1.0, 15.0):
        output = tmp_path / f"{scale}.png"
        given = ["--model", str(tmp_path / "model"), "--output", str(output), "--steps", "3"]
        main([*given, "--guidance-scale", str(scale), "--prompt", "a cat"])
        images[scale] = numpy.asarray(Image.open(output), dtype=float)
    with guided(pipe, APG(guidance_scale=15.0, norm_threshold=15.0, momentum=-0.5, eta=0.0)):
        generator = torch.Generator().manual_seed(0)
        expected = pipe("a cat", guidance_scale=5.0, num_inference_steps=3, generator=generator).images[0]
    assert numpy.abs(images[15.0] - numpy.asarray(expected, dtype=float)).max() <= 1  # of 255
    assert numpy.abs(images[15.0] - images[1.0]).max() > 2
