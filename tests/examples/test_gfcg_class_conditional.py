"""The example that the README shows, on a tiny DiT and a tiny ViT."""

import json
import runpy
from pathlib import Path

import numpy
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

SCRIPT = Path(__file__).parents[2] / "examples" / "gfcg_class_conditional.py"


def test_runs_and_guides(tiny_pipeline, tmp_path, monkeypatch, capsys):
    tiny_pipeline("dit").save_pretrained(tmp_path / "model")
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    classifier = ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8, num_labels=1000))
    torch.nn.init.normal_(classifier.classifier.weight)
    classifier.save_pretrained(tmp_path / "classifier")
    settings = dict(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (tmp_path / "classifier" / "preprocessor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main = runpy.run_path(str(SCRIPT))["main"]
    images = {}
    for strength in ("0", "4"):
        output = tmp_path / f"{strength}.png"
        given = ["--model", tmp_path / "model", "--classifier", tmp_path / "classifier", "--output", output]
        main([*map(str, given), "--steps", "4", "--strength", strength, "--labels", "1", "7"])
        images[strength] = numpy.asarray(Image.open(output), dtype=float)
    assert images["0"].shape == (32, 64, 3) and numpy.abs(images["4"] - images["0"]).max() > 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["1", "7", "1", "7"]
    assert all("guided away from [" in line and "[]" not in line for line in lines)
