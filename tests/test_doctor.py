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


def test_of_a_model_it_shows_where_backends_get_to(tmp_path, tiny_pipeline):
    tiny.pipeline("dit").save_pretrained(tmp_path / "pipe")
    rows = doctor.model_attention(tmp_path / "pipe")
    assert {row[3] for row in rows} == {"rerouted"} and len(rows) == 4
    assert ("transformer.transformer_blocks.0.attn1", "Attention", "AttnProcessor2_0", "rerouted", "") in rows
    build("clip_vision", tiny_pipeline).module.save_pretrained(tmp_path / "clip")
    rows = doctor.model_attention(tmp_path / "clip")
    assert {row[3] for row in rows} == {"interface"} and len(rows) == 2
    assert isinstance(CLIPVisionModel.from_pretrained(tmp_path / "clip"), CLIPVisionModel)


def test_networks_are_built_without_their_weights(tmp_path, monkeypatch):
    tiny.pipeline("sd15").save_pretrained(tmp_path / "pipe")
    expected = doctor.model_attention(tmp_path / "pipe")
    assert {row[0].partition(".")[0] for row in expected} == {"unet", "vae", "text_encoder"}
    for file in (tmp_path / "pipe").rglob("*.safetensors"):
        file.unlink()
    assert doctor.model_attention(tmp_path / "pipe") == expected

    def fails(path):
        raise NotImplementedError("it computes with weights when it is built")

    tiny.pipeline("sd15").save_pretrained(tmp_path / "whole")
    monkeypatch.setattr(doctor, "_without_weights", fails)
    assert sorted(doctor.model_attention(tmp_path / "whole")) == sorted(expected)


def test_names_are_shown_in_full_on_narrow_terminals(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "attention_backends", list)
    tiny.pipeline("sd15").unet.save_pretrained(tmp_path)
    rows = doctor.model_attention(tmp_path)
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["doctor", "--model", str(tmp_path)])
    assert shown.exit_code == 0 and "\u2026" not in shown.output
    table = shown.output.partition("Attention of")[2]
    lines = [line.strip("\u2502").split("\u2502") for line in table.splitlines() if line.startswith("\u2502")]
    assert {len(cells) for cells in lines} == {4}  # no remark, no column of remarks
    assert "".join(cells[0].strip() for cells in lines) == "".join(row[0] for row in rows)
    assert "reached" in table and "remark" not in table


def test_a_wrong_model_is_refused_before_anything_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "attention_backends", lambda: pytest.fail("tried backends first"))
    shown = CliRunner().invoke(cli.app, ["doctor", "--model", str(tmp_path / "none")])
    assert isinstance(shown.exception, FileNotFoundError) and not shown.output


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        doctor.model_attention(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="neither a model_index.json nor a config.json"):
        doctor.model_attention(tmp_path)
