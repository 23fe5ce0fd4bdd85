"""The example that the README shows, on a tiny Stable Diffusion 3."""

import runpy
from pathlib import Path

import numpy
import torch
from PIL import Image

from genkit.guidance.coarse import encode_reference
from genkit.pipelines.classic import decode

SCRIPT = Path(__file__).parents[2] / "examples" / "coarse_guided_image.py"


def test_runs_and_follows_the_image(tiny_pipeline, tmp_path, monkeypatch):
    pipe = tiny_pipeline("sd3")
    pipe.save_pretrained(tmp_path / "model")
    coarse = torch.rand(3, 8, 8).mul(255).round().byte()
    Image.fromarray(coarse.permute(1, 2, 0).numpy()).save(tmp_path / "coarse.png")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main = runpy.run_path(str(SCRIPT))["main"]
    with torch.no_grad():
        rebuilt = decode(pipe.vae, encode_reference(pipe.vae, coarse[None] / 127.5 - 1, (32, 32)))
    rebuilt = rebuilt[0].permute(1, 2, 0).add(1).mul(127.5).clamp(0, 255).numpy()
    distances = []
    for exponent in ("0", "2", "20"):
        output = tmp_path / f"{exponent}.png"
        given = [str(tmp_path / "coarse.png"), "--model", str(tmp_path / "model"), "--output", str(output)]
        main([*given, "--steps", "4", "--exponent", exponent, "--prompt", "a cat"])
        image = numpy.asarray(Image.open(output), dtype=float)
        assert image.shape == (32, 32, 3)
        distances.append(numpy.abs(image - rebuilt).mean())
    assert distances[0] <= 0.6 and distances[0] < distances[1] < distances[2]
