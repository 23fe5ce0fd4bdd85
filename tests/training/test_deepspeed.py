"""DeepSpeed and the rest of accelerate's configuration: ZeRO trains as one process does; what cannot be is an error."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from genkit.training import checkpoint, logs, machine, zero
from genkit.training.compare import first_difference
from genkit.training.config import TrainConfig
from tests.training.processes import check_bf16

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (extra 'deepspeed')"
)
OBJECTIVE = dict(name="flow_map", loss="lsd", diagonal_fraction=0.5)
SHARED = dict(objective=OBJECTIVE, max_grad_norm=0.5, gradient_accumulation_steps=2, lr_scheduler="constant")
SHARED |= dict(lr_warmup_steps=0, checkpointing_steps=4)


def launch(tmp_path, recipe, stage, **settings):
    """As ``accelerate config`` writes it, which asks for one accumulation step and a clipping of its own."""
    config = dict(zero_stage=stage, zero3_init_flag=False, gradient_accumulation_steps=1, gradient_clipping=7.0)
    config |= dict(offload_optimizer_device="none", offload_param_device="none") | settings
    file = dict(compute_environment="LOCAL_MACHINE", distributed_type="DEEPSPEED", deepspeed_config=config)
    file |= dict(mixed_precision="no", num_machines=1, num_processes=2, main_process_port=0, use_cpu=False)
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(file))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    return subprocess.run(
        [sys.executable, *command, "-m", "genkit.training", str(tmp_path / "recipe.yaml"), "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
    )


@needs_deepspeed
@pytest.mark.parametrize(
    "stage, settings, objective",
    [
        (0, {}, OBJECTIVE),
        (1, {}, OBJECTIVE),
        (2, {}, dict(name="flow_matching")),  # which leaves a weight without gradient
        (2, dict(offload_optimizer_device="cpu"), OBJECTIVE),
    ],
)
def test_one_process_and_zero_hand_a_run_to_each_other(toys, tmp_path, stage, settings, objective):
    """Losses, weights, averages and optimiser states agree with a run that never left its process."""
    shared, run = dict(SHARED, objective=objective), tmp_path / "run"
    toys.run(toys.digits(run, **shared, max_train_steps=4))
    done = launch(tmp_path, toys.settings(run, **shared, max_train_steps=8, resume="latest"), stage, **settings)
    assert done.returncode == 0, done.stderr
    line = "overridden by the recipe: gradient_accumulation_steps=1 (recipe: 2), gradient_clipping=7.0 (recipe: 0.5)"
    assert done.stderr.count(line) == 1, done.stderr
    toys.run(toys.digits(run, **shared, max_train_steps=12, resume="latest"))
    toys.run(toys.digits(tmp_path / "whole", **shared, max_train_steps=12))
    ours, theirs = (logs.read(tmp_path / name / logs.FILE) for name in ("run", "whole"))
    assert len(ours) == 12 and first_difference(ours, theirs, 1e-5) is None, first_difference(ours, theirs, 1e-5)
    norms = [[line["grad_norm/student"] for line in lines] for lines in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and max(norms[1]) > 0.5, "nothing was clipped"
    for step in (8, 12):
        folders = [tmp_path / name / f"checkpoint-{step}" for name in ("run", "whole")]
        for file in ("student.safetensors", "student.ema.safetensors"):
            x, y = (load_file(folder / file) for folder in folders)
            assert x.keys() == y.keys()
            for key in x:
                torch.testing.assert_close(x[key], y[key], rtol=1e-4, atol=1e-6)
        x, y = (torch.load(folder / checkpoint.OPTIMIZERS)["student"] for folder in folders)
        assert x["param_groups"] == y["param_groups"] and x["state"].keys() >= y["state"].keys()
        for i in y["state"]:
            torch.testing.assert_close(x["state"][i], y["state"][i], rtol=1e-4, atol=1e-6)


@needs_deepspeed
def test_zero_resumes_bit_for_bit_and_exports_the_averages(toys, tmp_path):
    sampled = dict(SHARED, sampling=dict(every=4, num_samples=8))
    for name, steps, resume in (("whole", 8, None), ("halves", 4, None), ("halves", 8, "latest")):
        done = launch(tmp_path, toys.settings(tmp_path / name, **sampled, max_train_steps=steps, resume=resume), 2)
        assert done.returncode == 0, done.stderr
    a, b = (logs.read(tmp_path / name / logs.FILE) for name in ("whole", "halves"))
    assert len(a) == 8 and a == b
    for file in ("student.safetensors", "student.ema.safetensors"):
        x, y = (load_file(tmp_path / name / "checkpoint-8" / file) for name in ("whole", "halves"))
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
    (exported,) = (tmp_path / "whole" / "pipeline" / "transformer").glob("*.safetensors")
    averages = load_file(tmp_path / "whole" / "checkpoint-8" / "student.ema.safetensors")
    assert all(torch.equal(w, averages[f"0.9/{name}"]) for name, w in load_file(exported).items())


@needs_deepspeed
def test_bf16_computes_by_autocast_on_float32_weights(toys, tmp_path):
    shared = dict(SHARED, max_train_steps=6, checkpointing_steps=6, mixed_precision="bf16")
    done = launch(tmp_path, toys.settings(tmp_path / "two", **shared), 1)
    assert done.returncode == 0, done.stderr
    shared["gradient_accumulation_steps"] = 4  # the items that a process had, so that bf16 rounds the same sums
    check_bf16(toys, tmp_path, shared)


def configure(toys, tmp_path, changes=None, **settings):
    """What becomes of a DeepSpeed configuration; no DeepSpeed needed."""
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}, **settings})
    accelerator = SimpleNamespace(num_processes=2, state=SimpleNamespace(deepspeed_plugin=plugin))
    config = TrainConfig(**toys.settings(tmp_path, **{**SHARED, **(changes or {})}))
    return zero.configure(accelerator, config), plugin.deepspeed_config


def test_the_recipe_decides(toys, tmp_path):
    zero2 = {"stage": 2, "reduce_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": False}
    replaced, settings = configure(
        toys,
        tmp_path,
        zero_optimization=zero2,
        train_batch_size="auto",
        train_micro_batch_size_per_gpu=64,
        gradient_clipping="auto",
        bf16={"enabled": True},
        fp16={"enabled": "auto", "loss_scale": 0},
    )
    assert replaced == [
        "train_micro_batch_size_per_gpu=64 (recipe: 2)",
        "bf16.enabled=True (recipe: autocast to no, weights in float32)",
    ]
    assert settings["train_batch_size"] == 8 and settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5 and settings["bf16"] == settings["fp16"] == {"enabled": False}
    assert "auto" not in json.dumps(settings)
    _, settings = configure(toys, tmp_path, zero_optimization={"stage": 0})
    assert settings["gradient_clipping"] == 0.0, "the trainer clips whole gradients"


@pytest.mark.parametrize(
    "settings, changes, message",
    [
        (dict(optimizer={"type": "AdamW"}), None, "optimizer=.*remove it; the recipe's optimizer"),
        (dict(scheduler={"type": "WarmupLR"}), None, "scheduler=.*remove it; the recipe's optimizer"),
        (dict(zero_optimization={"stage": 3}), None, "stage=3: accepted are 0, 1 and 2"),
        (
            dict(zero_optimization={"stage": 2, "offload_optimizer": {"device": "nvme"}}),
            None,
            "offload_optimizer.device=nvme: accepted with stage 2 are none, cpu",
        ),
        (
            dict(zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}}),
            None,
            "offload_param.device=cpu: accepted with stage 2 are none",
        ),
        (dict(zero_optimization={"stage": 2, "zenflow": {}}), None, "zero_optimization: key='zenflow'"),
        (dict(curriculum_learning={}), None, "deepspeed_config: key='curriculum_learning'"),
        ({}, dict(optimizer=dict(name="Adafactor")), "optimizer.name='Adafactor'.*accepted are ASGD, Adadelta, Adam"),
    ],
)
def test_deepspeed_settings_that_cannot_be_kept_are_refused(toys, tmp_path, settings, changes, message):
    with pytest.raises(ValueError, match=message):
        configure(toys, tmp_path, changes, **settings)


@pytest.mark.parametrize(
    "environment, changes, message",
    [
        (
            dict(ACCELERATE_USE_MEGATRON_LM="true"),
            {},
            "distributed_type=MEGATRON_LM: .*accepted are NO, .*DEEPSP",
        ),
        (
            dict(ACCELERATE_USE_PARALLELISM_CONFIG="true", PARALLELISM_CONFIG_TP_SIZE="2"),
            {},
            "parallelism_config: {'tp_size': 2}; accepted is dp_shard_size alone",
        ),
        (
            dict(ACCELERATE_DYNAMO_BACKEND="INDUCTOR", ACCELERATE_DYNAMO_USE_FULLGRAPH="true"),
            {},
            "dynamo_use_fullgraph=True: accepted is False",
        ),
        (
            dict(ACCELERATE_DYNAMO_BACKEND="INDUCTOR", ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION="true"),
            {},
            "dynamo_use_regional_compilation=True: accepted is False",
        ),
        (
            dict(ACCELERATE_DYNAMO_BACKEND="INDUCTOR", ACCELERATE_DYNAMO_USE_DYNAMIC="true"),
            {},
            "dynamo_use_dynamic=True: accepted is False",
        ),
        (
            dict(ACCELERATE_DYNAMO_BACKEND="INDUCTOR", ACCELERATE_USE_DEEPSPEED="true"),
            {},
            "accepted with distributed_type=DEEPSPEED is dynamo_backend=no",
        ),
        (dict(ACCELERATE_USE_DEEPSPEED="true"), dict(mixed_precision="fp16"), "not supported with FSDP and DeepSpeed"),
    ],
)
def test_machines_that_cannot_be_are_refused(toys, tmp_path, monkeypatch, environment, changes, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig(**toys.settings(tmp_path, **changes))
    with pytest.raises(ValueError, match=message):
        machine.accelerator(config, find_unused=False)


def test_compiled_and_with_other_precision_in_accelerates_file(toys, tmp_path, monkeypatch, caplog):
    """A compiled run is the run; settings of accelerate's that the recipe has are the recipe's."""
    objective = dict(OBJECTIVE, jvp="func")
    toys.run(toys.digits(tmp_path / "plain", objective=objective, max_train_steps=4))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    AcceleratorState._reset_state()
    compiled = toys.digits(tmp_path / "compiled", objective=objective, max_train_steps=4)
    assert type(compiled.wrapped).__name__ == "OptimizedModule"
    toys.run(compiled)
    assert [r.getMessage() for r in caplog.records if "overridden" in r.getMessage()] == [
        "accelerate's configuration is overridden by the recipe: mixed_precision=bf16 (recipe: no)"
    ]
    a, b = (logs.read(tmp_path / name / logs.FILE) for name in ("plain", "compiled"))
    assert len(a) == 4 and first_difference(a, b, 1e-6) is None, first_difference(a, b, 1e-6)
