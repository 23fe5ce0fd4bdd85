"""The example that the README shows, on a tiny Stable Diffusion 3."""

import runpy
from pathlib import Path

import numpy
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "pndm_on_sd3.py"


def test_runs_and_solves(tiny_pipeline, tmp_path, monkeypatch):
    pipe = tiny_pipeline("sd3")
    pipe.save_pretrained(tmp_path / "model")
    inputs = dict(guidance_scale=5.0, height=32, width=32, generator=torch.Generator().manual_seed(0))
    euler = pipe("a lighthouse in the fog", num_inference_steps=8, **inputs).images[0]
    forward, calls = SD3Transformer2DModel.forward, []

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main, differences = runpy.run_path(str(SCRIPT))["main"], {}
    for order, wanted in (("1", 8), ("2", 9), ("4", 9)):
        calls.clear()
        output = tmp_path / f"{order}.png"
        given = ["--model", str(tmp_path / "model"), "--output", str(output), "--order", order]
        main([*given, "--steps", "8", "--size", "32"])
        assert len(calls) == wanted
        differences[order] = numpy.abs(numpy.asarray(Image.open(output), float) - numpy.asarray(euler, float)).max()
    assert differences["1"] <= 1 < differences["4"]  # of 255: the first order is the pipeline's own
