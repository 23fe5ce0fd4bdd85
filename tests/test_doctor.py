"""What ``genkit doctor`` says of attention."""

import pytest
import torch
from transformers import CLIPVisionModel
from typer.testing import CliRunner

from genkit import cli, doctor, kernels
from genkit.testing import tiny
from tests.attention._networks import build


def test_every_backend_has_a_row_that_says_whether_it_works(monkeypatch):
    monkeypatch.setattr(kernels, "obstacle", lambda kind: "triton does not import (ImportError: broken); reinstall it")
    rows = {name: (works, remark) for name, works, remark in doctor.attention_backends()}
    for name in ("native", "_native_math", "genkit, eager", "forward mode"):
        assert rows[name][0], rows[name]
    assert rows["genkit, fused"] == (False, "triton does not import (ImportError: broken); reinstall it")
    if not torch.cuda.is_available():
        works, remark = rows["_native_cudnn"]
        assert not works and remark.startswith("on cpu, float32: ")
    assert "flash-attn" in rows["flash"][1] or rows["flash"][0]
    assert rows["flash_hub"] == (False, "not tried: it downloads a kernel from the Hub")


def test_of_a_model_it_shows_where_backends_get_to(tmp_path, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(doctor, "attention_backends", list)
    tiny.pipeline("dit").save_pretrained(tmp_path / "pipe")
    rows = doctor.model_attention(tmp_path / "pipe")
    assert {row[3] for row in rows} == {"rerouted"} and len(rows) == 4
    assert ("transformer.transformer_blocks.0.attn1", "Attention", "AttnProcessor2_0", "rerouted", "") in rows
    build("clip_vision", tiny_pipeline).module.save_pretrained(tmp_path / "clip")
    rows = doctor.model_attention(tmp_path / "clip")
    assert {row[3] for row in rows} == {"interface"} and len(rows) == 2
    assert isinstance(CLIPVisionModel.from_pretrained(tmp_path / "clip"), CLIPVisionModel)
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["doctor", "--model", str(tmp_path / "pipe")])
    assert shown.exit_code == 0 and "transformer.transformer_blocks.1.attn1" in shown.output


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        doctor.model_attention(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="neither a model_index.json nor a config.json"):
        doctor.model_attention(tmp_path)
