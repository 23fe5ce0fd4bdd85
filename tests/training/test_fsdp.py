"""FSDP: two processes that hold shards train as one process does, and write checkpoints that one process reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from genkit.pipelines import ClassConditionalPipeline
from genkit.training import checkpoint, logs, sharding
from genkit.training.compare import first_difference
from genkit.training.objectives.base import Phase

OBJECTIVE = dict(name="flow_map", loss="lsd", jvp="finite_difference", diagonal_fraction=0.5)
FSDP = dict(
    fsdp_version=2,
    fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP",
    fsdp_transformer_layer_cls_to_wrap="Block",
    fsdp_cpu_ram_efficient_loading=False,
    fsdp_state_dict_type="FULL_STATE_DICT",
)


def launch(tmp_path, recipe, *overrides):
    machine = dict(
        compute_environment="LOCAL_MACHINE",
        distributed_type="FSDP",
        fsdp_config=FSDP,
        mixed_precision="no",
        num_machines=1,
        num_processes=2,
        use_cpu=True,
        main_process_port=0,
    )
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(machine))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    command += ["-m", "genkit.training", str(tmp_path / "recipe.yaml"), "--quiet", *overrides]
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_two_processes_of_shards_equal_one(toys, tmp_path):
    shared = dict(objective=OBJECTIVE, checkpointing_steps=4, max_grad_norm=0.5)
    done = launch(tmp_path, toys.settings(tmp_path / "two", **shared, max_train_steps=8))
    assert done.returncode == 0, done.stderr
    toys.run(toys.digits(tmp_path / "one", **shared, max_train_steps=8))
    a, b = (logs.read(tmp_path / name / logs.FILE) for name in ("one", "two"))
    assert len(a) == 8 and first_difference(a, b, 1e-5) is None, first_difference(a, b, 1e-5)
    manifests = [json.loads((tmp_path / n / "checkpoint-8" / "manifest.json").read_text()) for n in ("one", "two")]
    assert manifests[0]["files"].keys() == manifests[1]["files"].keys()
    for file in ("student.safetensors", "student.ema.safetensors"):
        x, y = (load_file(tmp_path / name / "checkpoint-8" / file) for name in ("one", "two"))
        assert x.keys() == y.keys()
        for key in x:
            torch.testing.assert_close(x[key], y[key], rtol=1e-4, atol=1e-5)
    pipe = ClassConditionalPipeline.from_pretrained(str(tmp_path / "two" / "pipeline"))
    averages = load_file(tmp_path / "two" / "checkpoint-8" / "student.ema.safetensors")
    assert all(torch.equal(p, averages[f"0.9/{name}"]) for name, p in pipe.transformer.named_parameters())
    # One process goes on from what the shards wrote.
    settings = dict(shared, lr_scheduler="constant_with_warmup")
    resumed = toys.run(toys.digits(tmp_path / "two", **settings, max_train_steps=10, resume="latest"))
    assert resumed.step == 10 and list(checkpoint.found(tmp_path / "two"))[-1] == 10


def test_shards_resume_from_one_process(toys, tmp_path):
    shared = dict(objective=OBJECTIVE, checkpointing_steps=4, lr_scheduler="constant_with_warmup")
    toys.run(toys.digits(tmp_path / "run", **shared, max_train_steps=4))
    recipe = toys.settings(tmp_path / "run", **shared, max_train_steps=8, resume="latest")
    done = launch(tmp_path, recipe)
    assert done.returncode == 0, done.stderr
    toys.run(toys.digits(tmp_path / "whole", **shared, max_train_steps=8))
    a, b = (logs.read(tmp_path / name / logs.FILE) for name in ("whole", "run"))
    assert len(b) == 8 and first_difference(a, b, 1e-5) is None, first_difference(a, b, 1e-5)


class _Machine:
    mixed_precision = "no"

    def __init__(self, version):
        plugin = type("Plugin", (), {"fsdp_version": version})
        self.state = type("State", (), {"fsdp_plugin": plugin})


class _Method:
    def __init__(self, forward_mode=False):
        self.uses_forward_mode = forward_mode


@pytest.mark.parametrize(
    "version, method, phases, every, message",
    [
        (1, _Method(), [Phase("a", ("a",))], None, "accepted is fsdp_version=2"),
        (2, _Method(), [Phase("a", ("a",)), Phase("b", ("b",))], None, "in turns or by several losses"),
        (2, _Method(), [Phase("a", ("a",), backwards=2)], None, "in turns or by several losses"),
        (2, _Method(True), [Phase("a", ("a",))], None, "objective.jvp=finite_difference"),
        (2, _Method(), [Phase("a", ("a",))], 5, "sampling.every=5: not with FSDP"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(version, method, phases, every, message):
    with pytest.raises(ValueError, match=message):
        sharding.check(_Machine(version), method, phases, every)


def test_forward_mode_is_declared(toys, tmp_path):
    for loss, jvp, uses in (("lsd", "func", True), ("lsd", "finite_difference", False), ("psd_m", "func", False)):
        objective = dict(name="flow_map", loss=loss, jvp=jvp)
        assert toys.digits(Path(tmp_path, loss + jvp), objective=objective).objective.uses_forward_mode is uses
