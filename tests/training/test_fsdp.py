"""FSDP: two processes that hold shards train as one process does, and write checkpoints that one process reads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from genkit.pipelines import ClassConditionalPipeline
from genkit.quantizers import make
from genkit.training import checkpoint, logs, machine, sharding
from genkit.training.compare import first_difference
from genkit.training.ema import EMA
from genkit.training.objectives.base import Phase, Role
from genkit.training.roles import averaged_buffers
from tests.training.processes import check_bf16

SHARDED = [str(Path(__file__).with_name("fsdp_on_cpu.py"))]
OBJECTIVE = dict(name="flow_map", loss="lsd", jvp="finite_difference", diagonal_fraction=0.5)
FSDP = dict(
    fsdp_version=2,
    fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP",
    fsdp_transformer_layer_cls_to_wrap="Block",
    fsdp_cpu_ram_efficient_loading=False,
    fsdp_state_dict_type="FULL_STATE_DICT",
)


# As `accelerate config` writes it for version 1.
FSDP1 = dict(
    fsdp_activation_checkpointing=False,
    fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP",
    fsdp_backward_prefetch="BACKWARD_PRE",
    fsdp_cpu_ram_efficient_loading=True,
    fsdp_forward_prefetch=False,
    fsdp_offload_params=False,
    fsdp_reshard_after_forward="SHARD_GRAD_OP",
    fsdp_state_dict_type="SHARDED_STATE_DICT",
    fsdp_sync_module_states=True,
    fsdp_transformer_layer_cls_to_wrap="Block",
    fsdp_use_orig_params=True,
    fsdp_version=1,
)


def launch(tmp_path, recipe, *overrides, fsdp=FSDP, program=SHARDED, mixed_precision="no"):
    machine = dict(
        compute_environment="LOCAL_MACHINE",
        distributed_type="FSDP",
        fsdp_config=fsdp,
        mixed_precision=mixed_precision,
        num_machines=1,
        num_processes=2,
        use_cpu=True,
        main_process_port=0,
    )
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(machine))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    command += [*program, str(tmp_path / "recipe.yaml"), "--quiet", *overrides]
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_two_processes_of_shards_equal_one(toys, tmp_path):
    shared = dict(objective=OBJECTIVE, checkpointing_steps=4, max_grad_norm=0.5, gradient_accumulation_steps=2)
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
    done = launch(tmp_path, recipe, fsdp=FSDP1, mixed_precision="bf16")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fsdp_version=1 runs as fsdp_version=2, fsdp_reshard_after_forward=False") == 1
    assert done.stderr.count("overridden by the recipe: mixed_precision=bf16 (recipe: no)") == 1
    toys.run(toys.digits(tmp_path / "whole", **shared, max_train_steps=8))
    a, b = (logs.read(tmp_path / name / logs.FILE) for name in ("whole", "run"))
    assert len(b) == 8 and first_difference(a, b, 1e-5) is None, first_difference(a, b, 1e-5)


def test_bf16_computes_by_autocast_on_float32_shards(toys, tmp_path):
    shared = dict(objective=OBJECTIVE, max_train_steps=6, mixed_precision="bf16")
    done = launch(tmp_path, toys.settings(tmp_path / "two", **shared))
    assert done.returncode == 0, done.stderr
    shared["gradient_accumulation_steps"] = 2  # the items that a process had, so that bf16 rounds the same sums
    check_bf16(toys, tmp_path, shared)


def test_fsdp_that_would_be_ddp_is_refused(toys, tmp_path):
    done = launch(tmp_path, toys.settings(tmp_path / "two"), program=["-m", "genkit.training"])
    assert done.returncode != 0 and "set distributed_type=MULTI_CPU" in done.stderr


def _averages(shard=None):
    """Two updates of averages of weights and of a moving-average codebook, and what the network has after them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), make("vq", dim=4, codebook_size=8, rule="ema"))
    if shard is not None:
        shard(module)
    ema = EMA(dict(module.named_parameters()) | averaged_buffers(module), [0.9])
    for _ in range(2):
        with torch.no_grad():
            for tensor in (*module.parameters(), module[1].embedding):
                tensor.mul_(1.5)
        ema.update()
    return sharding.whole(ema.state_dict()), sharding.whole(module.state_dict())


def _in_shards(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = _averages(lambda module: fully_shard(module, mesh=init_device_mesh("cpu", (2,))))
    for k, tensors in enumerate(found):
        save_file({name: value.contiguous() for name, value in tensors.items()}, f"{folder}/{rank}-{k}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_averages_of_shards_and_of_a_whole_codebook(tmp_path):
    """A codebook of moving averages lies in no shards, and its averages go beside those that do."""
    mp.spawn(_in_shards, (str(tmp_path),), nprocs=2)
    for k, expected in enumerate(_averages()):
        for rank in range(2):
            found = load_file(tmp_path / f"{rank}-{k}.safetensors")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


class _Method:
    def __init__(self, forward_mode=False, shards=True):
        self.uses_forward_mode, self.shards = forward_mode, shards


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
@pytest.mark.parametrize(
    "phases",
    [[Phase("a", ("a",)), Phase("b", ("b",))], [Phase("a", ("a",), backwards=2)]],
)
def test_methods_of_several_networks_or_losses_are_refused(kind, phases):
    with pytest.raises(ValueError, match=f"{kind.value}: objective=_Method .*in turns or by several losses"):
        machine.check(SimpleNamespace(distributed_type=kind), None, _Method(), phases)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_methods_that_move_weights_themselves_are_refused(kind):
    method = _Method()
    method.roles = {"average": Role(nn.Linear(1, 1), trains=False, kept=True)}
    with pytest.raises(ValueError, match=rf"{kind.value}: objective=_Method changes the weights of \['average'\]"):
        machine.check(SimpleNamespace(distributed_type=kind), None, method, [Phase("a", ("a",))])


@pytest.mark.parametrize(
    "method, every, message",
    [
        (_Method(True), None, "objective.jvp=finite_difference"),
        (_Method(), 5, "sampling.every=5: not with FSDP"),
        (_Method(shards=False), None, "FSDP: objective=_Method calls its networks in ways that shards do not allow"),
    ],
)
def test_what_needs_whole_weights_is_refused(method, every, message):
    with pytest.raises(ValueError, match=message):
        sharding.check(method, sampling=every)


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("RESHARD_AFTER_FORWARD", "no_shard", "fsdp_sharding_strategy=NO_SHARD: accepted are"),
        ("SHARDING_STRATEGY", "4", "fsdp_sharding_strategy=HYBRID_SHARD: accepted are"),
        ("ACTIVATION_CHECKPOINTING", "true", "set gradient_checkpointing=true in the recipe"),
        ("OFFLOAD_PARAMS", "true", "fsdp_offload_params=true: accepted is false"),
        ("IGNORED_MODULES", "x_embed", "fsdp_ignored_modules=x_embed: accepted is none"),
    ],
)
def test_fsdp_settings_that_cannot_be_kept_are_refused(monkeypatch, setting, value, message):
    monkeypatch.setenv(f"FSDP_{setting}", value)
    with pytest.raises(ValueError, match=message):
        sharding.plugin()


def test_forward_mode_is_declared(toys, tmp_path):
    for i, (settings, uses) in enumerate(
        (
            (dict(loss="lsd", jvp="func"), True),
            (dict(loss="lsd", jvp="finite_difference"), False),
            (dict(loss="psd_m"), False),
        )
    ):
        objective = dict(name="flow_map", **settings)
        assert toys.digits(tmp_path / str(i), objective=objective).objective.uses_forward_mode is uses
