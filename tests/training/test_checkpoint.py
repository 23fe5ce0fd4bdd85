"""Checkpoints on a disk that fails, is cut short, or holds something else."""

import errno
import json
import logging
import shutil

import pytest
import torch

from genkit.networks.tokenizer import ImageTokenizer
from genkit.training import checkpoint
from genkit.training.checkpoint import CheckpointError, Snapshot
from tests.training.ready import small_tokenizer


def snapshot(step, value=0.0):
    weights = {"weight": torch.full((4, 4), value), "bias": torch.arange(4.0)}
    return Snapshot(step, {"student": weights}, {"student": {"state": {}, "param_groups": []}}, {"config": {"seed": 1}})


WANTED = snapshot(0).tensors


def test_round_trip(tmp_path):
    path = checkpoint.save(tmp_path, snapshot(10, 3.0))
    loaded = checkpoint.load(path, WANTED)
    assert path.name == "checkpoint-10" and loaded.step == 10 and loaded.info["config"] == {"seed": 1}
    assert torch.equal(loaded.tensors["student"]["weight"], torch.full((4, 4), 3.0))
    assert loaded.optimizers == {"student": {"state": {}, "param_groups": []}}
    checkpoint.save(tmp_path, snapshot(10, 4.0))
    assert checkpoint.load(path, WANTED).tensors["student"]["weight"][0, 0] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]


@pytest.mark.parametrize("where", ["save_file", "torch.save", "fsync", "replace"])
def test_full_disk_leaves_the_previous_checkpoint_whole(where, tmp_path, monkeypatch):
    checkpoint.save(tmp_path, snapshot(10, 3.0))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    targets = {"save_file": (checkpoint, "save_file"), "torch.save": (torch, "save")}
    targets |= {"fsync": (checkpoint.os, "fsync"), "replace": (checkpoint.os, "replace")}
    with monkeypatch.context() as patch:
        patch.setattr(*targets[where], full)
        with pytest.raises(CheckpointError, match="checkpoint-20 could not be written.*No space left.*checkpoint-10"):
            checkpoint.save(tmp_path, snapshot(20))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]
    assert checkpoint.load(tmp_path / "checkpoint-10", WANTED).tensors["student"]["weight"][0, 0] == 3


def test_full_disk_in_a_run(toys, tmp_path, monkeypatch):
    saved = checkpoint.save_file

    def full(tensors, path):
        if "checkpoint-20" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="last good checkpoint is .*checkpoint-10"):
            toys.digits(tmp_path).train()
    resumed = toys.run(toys.digits(tmp_path, resume="latest"))
    assert resumed.saving.resumed_from == tmp_path / "checkpoint-10" and resumed.step == 20


@pytest.mark.parametrize("name", ["student.safetensors", checkpoint.OPTIMIZERS])
def test_truncated_file_is_named(name, tmp_path):
    path = checkpoint.save(tmp_path, snapshot(10))
    size = (path / name).stat().st_size
    (path / name).write_bytes((path / name).read_bytes()[: size // 2])
    with pytest.raises(CheckpointError, match=f"{name} has {size // 2} bytes, wanted {size}: it is truncated"):
        checkpoint.load(path, WANTED)


@pytest.mark.parametrize("name", ["student.safetensors", checkpoint.OPTIMIZERS])
def test_overwritten_file_is_named(name, tmp_path):
    path = checkpoint.save(tmp_path, snapshot(10))
    (path / name).write_bytes(b"x" * (path / name).stat().st_size)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(path, WANTED)


def test_foreign_checkpoints_are_refused(tmp_path):
    path = checkpoint.save(tmp_path, snapshot(10))
    diffusers = tmp_path / "checkpoint-500"
    diffusers.mkdir()
    (diffusers / "optimizer.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"manifest.json is missing, found \['optimizer.bin'\]"):
        checkpoint.load(diffusers, WANTED)
    assert list(checkpoint.found(tmp_path)) == [10]
    with pytest.raises(CheckpointError, match=r"'weight' has shape \(4, 4\), wanted \(2, 4\)"):
        checkpoint.load(path, {"student": {"weight": torch.zeros(2, 4), "bias": torch.zeros(4)}})
    with pytest.raises(CheckpointError, match=r"lacks 1 wanted tensors \['scale'\] and holds 2 unknown"):
        checkpoint.load(path, {"student": {"scale": torch.zeros(4)}})
    with pytest.raises(CheckpointError, match="fake.safetensors is missing.*another run"):
        checkpoint.load(path, WANTED | {"fake": {}})
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"format": "other"}))
    with pytest.raises(CheckpointError, match="has format 'other', wanted 'genkit training checkpoint 1'"):
        checkpoint.load(path, WANTED)


def test_optimizer_file_runs_no_code(tmp_path):
    path = checkpoint.save(tmp_path, snapshot(10))
    torch.save({"student": pytest.raises}, path / checkpoint.OPTIMIZERS)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][checkpoint.OPTIMIZERS] = (path / checkpoint.OPTIMIZERS).stat().st_size
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="optimizers.pt cannot be read"):
        checkpoint.load(path, WANTED)


def test_rotation(tmp_path):
    for step in (10, 20, 100, 110):
        checkpoint.save(tmp_path, snapshot(step))
    checkpoint.prune(tmp_path, None, None)
    assert list(checkpoint.found(tmp_path)) == [10, 20, 100, 110]
    checkpoint.prune(tmp_path, 3, tmp_path / "checkpoint-10")
    assert list(checkpoint.found(tmp_path)) == [10, 100, 110]
    checkpoint.prune(tmp_path, 1, tmp_path / "checkpoint-10")
    assert list(checkpoint.found(tmp_path)) == [10, 110]
    checkpoint.prune(tmp_path, 1, None)
    assert list(checkpoint.found(tmp_path)) == [110]


def test_what_a_kill_leaves_is_ignored_and_cleaned(tmp_path):
    path = checkpoint.save(tmp_path, snapshot(10))
    shutil.copytree(path, tmp_path / ".writing-checkpoint-20")
    shutil.copytree(path, tmp_path / ".replaced-checkpoint-5")
    (tmp_path / "checkpoint-30").mkdir()  # someone else's, without manifest
    assert checkpoint.locate("latest", tmp_path) == path
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-30"]


def test_resume_needs_something_to_resume(toys, tmp_path):
    with pytest.raises(CheckpointError, match="resume='checkpoint-7': no such folder; accepted are 'latest'"):
        toys.digits(tmp_path, resume="checkpoint-7")
    assert toys.digits(tmp_path, resume="latest").step == 0


def test_a_run_does_not_overwrite_another(toys, tmp_path):
    toys.run(toys.digits(tmp_path, max_train_steps=4, checkpointing_steps=2))
    with pytest.raises(ValueError, match="holds checkpoints up to step 4; set resume=latest"):
        toys.digits(tmp_path)
    with pytest.raises(ValueError, match=r"is at step 2, but output_dir holds later checkpoints \(steps \[4\]\)"):
        toys.digits(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    elsewhere = toys.digits(tmp_path / "other", resume=str(tmp_path / "checkpoint-2"))
    assert elsewhere.step == 2


def test_changed_settings_are_reported(toys, tmp_path, caplog):
    toys.run(toys.digits(tmp_path, max_train_steps=4))
    toys.digits(tmp_path, max_train_steps=4, logging_steps=1, resume="latest")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    toys.digits(tmp_path, max_train_steps=4, seed=5, resume="latest")
    assert "seed (0 -> 5)" in caplog.text and "logging_steps" not in caplog.text
    model = dict(network="dit", hidden_size=32, num_layers=1, num_heads=2)
    with pytest.raises(CheckpointError, match="wanted"):
        toys.digits(tmp_path, model=model, resume="latest")
    with pytest.raises(CheckpointError, match="holds the state of AdamW for role 'student', wanted SGD"):
        toys.run(toys.digits(tmp_path, max_train_steps=6, optimizer=dict(name="SGD", lr=1e-3), resume="latest"))


def test_a_component_with_other_weights_is_refused(toys, tmp_path):
    def tokenizer(seed: int) -> None:
        torch.manual_seed(seed)
        settings = small_tokenizer(kind="fsq", levels=[3, 3], dim=2)
        ImageTokenizer(**{k: v for k, v in settings.items() if k != "network"}).save_pretrained(tmp_path / "tokenizer")

    def settings(**changes) -> dict:
        model = dict(network="gpt", vocab_size=9, sample_size=4, hidden_size=16, num_layers=1, num_heads=2)
        model |= dict(components=dict(vqvae=str(tmp_path / "tokenizer")))
        shared = dict(model=model, objective=dict(name="autoregressive"), max_train_steps=2, checkpointing_steps=2)
        return toys.digits(tmp_path / "run", **shared | changes)

    tokenizer(0)
    toys.run(settings())
    assert toys.run(settings(resume="latest", max_train_steps=3)).step == 3
    tokenizer(1)
    with pytest.raises(ValueError, match="model.components.vqvae='.*tokenizer' has the weights .* was trained with"):
        toys.run(settings(resume="latest", max_train_steps=4))
    tokenizer(0)
    assert toys.run(settings(resume="latest", max_train_steps=4)).step == 4


def test_settings_that_differ_are_said(toys, tmp_path, caplog):
    """As a warning where the run can go on, and where it cannot beside what does not fit."""
    toys.run(toys.digits(tmp_path / "a", max_train_steps=4, checkpointing_steps=2), stop=2)
    caplog.clear()
    other = dict(name="flow_matching", condition_dropout=0.25)
    toys.digits(tmp_path / "a", max_train_steps=4, checkpointing_steps=2, resume="latest", objective=other)
    assert "go on as it would have: objective.condition_dropout (unset -> 0.25)" in caplog.text
    lora = dict(kind="lora", rank=2)
    with pytest.raises(CheckpointError, match=r"lacks .*; settings that differ: adapter.kind \(full -> lora\), adap"):
        toys.digits(tmp_path / "a", max_train_steps=4, checkpointing_steps=2, resume="latest", adapter=lora)

    def inverted(window, **changes):
        subspace = None if window is None else dict(window=window)
        objective = dict(name="zoodip", token="3", quantization="none", subspace=subspace)
        return toys.digits(
            tmp_path / "b", objective=objective, max_train_steps=4, checkpointing_steps=2, ema=None, **changes
        )

    toys.run(inverted(8), stop=2)
    with pytest.raises(
        CheckpointError, match=r"has shape .*; settings that differ: objective.subspace.window \(8 -> 4"
    ):
        inverted(4, resume="latest")
    inverted(None, resume="latest")
    assert "objective.subspace (unset -> None), objective.subspace.window (8 -> unset)" in caplog.text
