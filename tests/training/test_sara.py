"""SaRA in the trainer: every method, every machine, exact resumes, and files that give the same samples."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.nn.utils import parametrize
from typer.testing import CliRunner

from genkit import load_flow_map
from genkit.cli import app
from genkit.denoisers import TwoTime, from_pipeline
from genkit.pipelines.commands import adopt, load_pipeline
from genkit.registry import members
from genkit.sara import sara_layers
from genkit.sara_files import SARA_NAME
from genkit.testing import tiny
from genkit.training import checkpoint, logs, machine
from genkit.training.__main__ import train as command
from genkit.training.adapters import without_adapter
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.distill import save
from genkit.training.export import export
from genkit.training.objectives.base import Objective
from genkit.training.parts.reference import Reference
from genkit.training.saving import load_averages
from genkit.training.scores import Score
from genkit.training.trainer import Trainer
from tests.training.ready import READY

ROOT = Path(__file__).parents[2]
ADAMW = dict(name="AdamW", lr=2e-3, weight_decay=0.0)


@pytest.fixture(scope="module")
def teacher(toys, tmp_path_factory):
    return toys.teacher(tmp_path_factory.mktemp("teacher"))


def make(toys, folder, model, **changes):
    """A run of eight steps on digits, or on whatever ``model`` takes."""
    adapter = dict(kind="sara", threshold=0.05) | changes.pop("adapter", {})
    values = dict(
        model=dict(pretrained=str(model)),
        adapter=adapter,
        optimizer=ADAMW,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        max_train_steps=8,
        checkpointing_steps=4,
        logging_steps=1,
    )
    return toys.digits(folder, **values | changes)


def velocity(denoiser, condition, shape=(4, 1, 8, 8)):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return denoiser(x, torch.full((shape[0],), 0.5), condition).velocity


def digits(denoiser, pipe=None):
    return velocity(denoiser, denoiser.encode(pipe, class_labels=[0, 1, 2, 3]))


def test_a_run_and_what_it_leaves(toys, teacher, tmp_path):
    """Killed and resumed, and read back in a process that knows nothing of it."""
    trainer = make(toys, tmp_path / "whole", teacher)
    base = digits(from_pipeline(load_pipeline(teacher)))
    assert torch.equal(digits(trainer.run.student), base)
    names = list(trainer.roles["student"].parameters)
    assert names and all(name.endswith(".parametrizations.weight.0.delta") for name in names)
    toys.run(trainer)
    with without_adapter(trainer.run.student):
        assert torch.equal(digits(trainer.run.student), base)
    # The weights that did not train, and of those that left at the middle all that came after.
    half, end = (load_file(tmp_path / f"whole/checkpoint-{n}/student.safetensors") for n in (4, 8))
    left = {n: ~v for n, v in end.items() if n.endswith(".active")}
    assert not any((~v).any() for n, v in half.items() if n.endswith(".active")) and any(v.any() for v in left.values())
    for name, gone in left.items():
        delta = name.replace(".active", ".delta")
        assert torch.equal(end[delta][gone], half[delta][gone]) and not torch.equal(end[delta], half[delta])
    toys.run(make(toys, tmp_path / "part", teacher), stop=4)
    torch.manual_seed(9)
    toys.run(make(toys, tmp_path / "part", teacher, resume="latest"))
    for name in ("student", "student.ema"):
        a, b = ((tmp_path / run / f"checkpoint-8/{name}.safetensors").read_bytes() for run in ("whole", "part"))
        assert a == b
    assert len({(tmp_path / run / logs.FILE).read_text() for run in ("whole", "part")}) == 1
    folder = export(trainer)
    assert folder == tmp_path / "whole/sara" and [p.name for p in folder.iterdir()] == [SARA_NAME]
    with trainer.averaged():
        tuned = digits(trainer.run.student)
    assert (tuned - base).abs().max() > 1e-2
    pipe = load_pipeline(teacher)
    pipe.load_adapter(folder)
    assert torch.equal(digits(from_pipeline(pipe)), tuned)
    drawn = {}
    for where in ("here", "there"):
        arguments = [
            str(teacher),
            "--adapter",
            str(folder),
            "--steps",
            "2",
            "--quiet",
            "--output",
            str(tmp_path / where),
        ]
        if where == "here":
            CliRunner().invoke(app, ["sample", *arguments], catch_exceptions=False)
        else:
            subprocess.run([sys.executable, "-m", "genkit.cli", "sample", *arguments], check=True, cwd=tmp_path)
        drawn[where] = (tmp_path / where / "grid.png").read_bytes()
    assert drawn["here"] == drawn["there"]


# Two train something beside the network, and refuse it (test_build.py).
@pytest.mark.parametrize(
    "name", sorted(members("genkit.training.objectives", Objective).keys() - {"readout", "zoodip"})
)
def test_every_method_trains_one(name, toys, teacher, tmp_path):
    """Two steps move the selected weights and no others, and what is exported can be read."""
    case = READY[name][0]
    changes = dict(adapter=dict(kind="sara", num_params=300), optimizer=ADAMW, max_train_steps=2, checkpointing_steps=2)
    settings = toys.case_settings(tmp_path / "run", name, case, teacher, **changes)
    trainer = Trainer(build(TrainConfig(**settings).check()), quiet=True)
    role = next(iter(trainer.roles.values()))
    frozen = {n: p.clone() for n, p in trainer.objective.student.module.named_parameters() if not p.requires_grad}
    layers = sara_layers(trainer.objective.student.module)
    toys.run(trainer)
    assert all(line["loss"] == line["loss"] for line in logs.read(tmp_path / "run" / logs.FILE) if "loss" in line)
    anew = "network" in settings["model"]  # no gradient passes a head of zeros, which is left out
    assert role.sparse is not None and role.module is trainer.objective.student.module
    assert anew or any(sara.delta.any() for sara in layers.values())
    for path, module in trainer.objective.student.module.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            sara, key = module.parametrizations["weight"][0], f"{path}.parametrizations.weight.original"
            now, then = module.parametrizations.weight.original.flatten(), frozen.pop(key).flatten()
            other = torch.ones_like(now, dtype=torch.bool)
            other[sara.index] = False
            assert torch.equal(now[other], then[other])
    for key, then in frozen.items():
        assert torch.equal(trainer.objective.student.module.get_parameter(key), then), key
    keys = [key for file in export(trainer).rglob("*.safetensors") for key in load_file(file)]
    assert keys and not any("parametrizations" in key for key in keys)


def test_the_low_rank_term_acts(toys, teacher, tmp_path):
    ends = {}
    for name, adapter in {
        "none": dict(lambda_rank=0),
        "weight": dict(lambda_rank=1.0),
        "delta": dict(lambda_rank=1.0, rank_target="delta"),
    }.items():
        toys.run(make(toys, tmp_path / name, teacher, adapter=adapter))
        ends[name] = load_file(tmp_path / name / "checkpoint-8/student.safetensors")
    key = next(k for k in ends["none"] if "modulation" in k and k.endswith("delta"))
    for a, b in (("none", "weight"), ("none", "delta"), ("weight", "delta")):
        assert (ends[a][key] - ends[b][key]).abs().max() > 1e-4


def reference_of(student, decay):
    reference = Reference(student, decay)
    with reference.network() as network:
        return digits(network), reference


def test_a_reference_is_the_network_without_it(toys, teacher, tmp_path):
    trainer = make(toys, tmp_path, teacher)
    student, base = trainer.run.student, digits(trainer.run.student)
    start, held = reference_of(student, 1.0)
    middle, follower = reference_of(student, 0.5)
    toys.run(trainer)
    assert held.held is None and torch.equal(start, base) and torch.equal(middle, base)
    assert torch.equal(reference_of(student, 1.0)[0], base)
    with follower.network() as network:
        assert torch.equal(digits(network), base)
    follower.update()  # the first one goes all the way
    with follower.network() as network:
        assert torch.equal(digits(network), digits(student))
    assert not torch.equal(digits(student), base)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_pipelines_of_prompts(kind, toys, tmp_path):
    """Trained, exported, and loaded onto the base: with checkpointing, and with a frozen part in half precision."""
    tiny.pipeline(kind).save_pretrained(tmp_path / "base")
    changes = dict(data=dict(name="synthetic"), global_batch_size=2, max_train_steps=4, checkpointing_steps=2)
    trainer = make(toys, tmp_path / "run", tmp_path / "base", **changes)
    condition = from_pipeline(trainer.run.pipe).encode(trainer.run.pipe, prompt=["a cat", "seven dogs"])
    before = velocity(trainer.run.student, condition, (2, 4, 16, 16))
    toys.run(trainer)
    with trainer.averaged():
        after = velocity(trainer.run.student, condition, (2, 4, 16, 16))
    assert (after - before).abs().max() > 1e-3
    pipe = adopt(type(trainer.run.pipe).from_pretrained(tmp_path / "base"))
    pipe.load_adapter(export(trainer))
    assert torch.equal(velocity(from_pipeline(pipe), condition, (2, 4, 16, 16)), after)
    toys.run(make(toys, tmp_path / "slow", tmp_path / "base", gradient_checkpointing=True, **changes))
    a, b = (load_file(tmp_path / run / "checkpoint-4/student.safetensors") for run in ("run", "slow"))
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-6) for k in a)
    precise = [line["loss"] for line in logs.read(tmp_path / "run" / logs.FILE)]
    AcceleratorState._reset_state()  # a process has one precision
    half = make(toys, tmp_path / "half", tmp_path / "base", frozen_dtype="bfloat16", mixed_precision="bf16", **changes)
    weights = list(half.run.student.module.parameters())
    assert {p.dtype for p in weights if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in weights if not p.requires_grad} == {torch.bfloat16}
    toys.run(half)
    assert [line["loss"] for line in logs.read(tmp_path / "half" / logs.FILE)] == pytest.approx(precise, rel=5e-2)


def test_a_flow_map(toys, tmp_path):
    """Beside the embedder of its second time, which trains whole; as files, and as a pipeline of few steps."""
    tiny.pipeline("sd3").save_pretrained(tmp_path / "base")
    changes = dict(objective=dict(name="flow_map", loss="psd_m"), data=dict(name="synthetic"), global_batch_size=2)
    trainer = make(toys, tmp_path / "run", tmp_path / "base", max_train_steps=4, checkpointing_steps=4, **changes)
    condition = from_pipeline(trainer.run.pipe).encode(trainer.run.pipe, prompt=["a cat", "seven dogs"])
    assert any("gap_embedder" in n for n in trainer.roles["student"].parameters)
    toys.run(trainer)

    def output(student: TwoTime):
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return student.average_velocity(x, torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.1]), condition)

    with trainer.averaged():
        after = output(trainer.run.student)
    folder = export(trainer)
    assert {p.name for p in folder.iterdir()} >= {SARA_NAME, "gap_embedder.safetensors"}
    loaded = load_flow_map(type(trainer.run.pipe).from_pretrained(tmp_path / "base"), folder)
    assert torch.equal(output(loaded), after)
    save(trainer, tmp_path / "few_step")
    few = load_pipeline(tmp_path / "few_step")
    assert torch.equal(
        few.denoiser().denoiser.inner.get_parameter("proj_out.weight"), loaded.denoiser.inner.proj_out.weight
    )


def test_rounds_go_on_from_the_merged_weights(toys, teacher, tmp_path, monkeypatch):
    falling = itertools.count(0, -1)
    monkeypatch.setattr(Score, "__call__", lambda *_: float(next(falling)))  # every student is better than the last
    play = dict(count=2, num_fakes=50, num_samples=40, num_inference_steps=2, batch_size=20, evaluate_every=2)
    values = toys.settings(
        tmp_path / "run",
        model=dict(pretrained=str(teacher)),
        adapter=dict(kind="sara", threshold=0.05),
        objective=dict(name="ddo", alpha=1.0, beta=0.05),
        rounds=play,
        optimizer=ADAMW,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        global_batch_size=32,
        max_train_steps=4,
        checkpointing_steps=2,
    )
    final = load_pipeline(command(TrainConfig(**values).check(), quiet=True)).transformer
    best = load_file(tmp_path / "run/round-1/student-0/best.safetensors")
    promoted = load_pipeline(tmp_path / "run/round-1/promoted").transformer
    student = build(TrainConfig(**values | dict(rounds=None))).student.module
    for name, sara in sara_layers(student).items():
        layer = name.removesuffix(".weight")
        delta = best[f"{layer}.parametrizations.weight.0.delta"]
        assert delta.any()
        assert torch.equal(promoted.get_parameter(name).flatten()[sara.index], sara.base + delta)
    assert type(final) is type(promoted) and not sara_layers(final)


def test_a_checkpoint_goes_on_from_its_base_and_its_places_alone(toys, teacher, tmp_path):
    """Another base at the same path may have as many small weights: only hashes can tell."""
    shutil.copytree(teacher, tmp_path / "base")
    run = dict(model=tmp_path / "base", adapter=dict(threshold=None, num_params=500, target_modules=["qkv"]))
    first = make(toys, tmp_path / "run", **run)
    toys.run(first, stop=4)
    checkpoint_of_4 = tmp_path / "run/checkpoint-4"
    load_averages(build(first.config).student.module, checkpoint_of_4, "student", 0.9)
    pipe = load_pipeline(tmp_path / "base")
    with torch.no_grad():
        layer = pipe.transformer.get_submodule(next(iter(sara_layers(first.run.student.module))).rsplit(".", 1)[0])
        largest = layer.weight.abs().argmax()
        layer.weight.view(-1)[largest] *= 1.5
    pipe.save_pretrained(tmp_path / "base")
    config = first.config.model_copy(update=dict(resume="latest"))
    for use in (
        lambda: make(toys, tmp_path / "run", resume="latest", **run),
        lambda: load_averages(build(config).student.module, checkpoint_of_4, "student", 0.9),
    ):
        with pytest.raises(checkpoint.CheckpointError, match="changes of another base model: .* has the hash .* here"):
            use()
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(teacher, tmp_path / "base")
    assert make(toys, tmp_path / "run", resume="latest", **run).step == 4
    fewer = run | dict(adapter=run["adapter"] | dict(num_params=400))
    with pytest.raises(checkpoint.CheckpointError, match=r"other places: .* adapter.num_params \(500 -> 400\)"):
        make(toys, tmp_path / "run", resume="latest", **fewer)
    other = run | dict(adapter=run["adapter"] | dict(target_modules=None))
    with pytest.raises(checkpoint.CheckpointError, match=r"here are .* only here; settings that differ: adapter.targ"):
        make(toys, tmp_path / "run", resume="latest", **other)


def _one_of_two(rank, port, toys, folder, teacher):
    torch.set_num_threads(1)
    own = dict(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2") | own
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = make(toys, folder, teacher)
    # Places and bases are the same anyway: they are not sent.
    names = [n for n, _ in trainer.objective.named_buffers() if n.endswith((".index", ".base", ".active"))]
    assert names and set(names) <= set(trainer.objective._ddp_params_and_buffers_to_ignore)
    toys.run(trainer)
    mine = torch.cat([p.detach().flatten() for p in trainer.roles["student"].parameters.values()])
    both = trainer.accelerator.gather(mine[None])
    assert trainer.accelerator.num_processes == 2 and len(both) == 2 and torch.equal(*both)
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(toys, teacher, tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    mp.start_processes(_one_of_two, (port, toys, tmp_path / "two", teacher), nprocs=2, start_method="fork")
    toys.run(make(toys, tmp_path / "one", teacher))
    one, two = (load_file(tmp_path / run / "checkpoint-8/student.safetensors") for run in ("one", "two"))
    for key in one:
        if key.endswith("delta"):
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-4)
            assert one[key].abs().max() > 1e-3
    a, b = ([line["loss"] for line in logs.read(tmp_path / run / logs.FILE)] for run in ("one", "two"))
    assert a == pytest.approx(b, rel=1e-5)


def test_refusals(toys, teacher, tmp_path):
    for threshold, what in ((1e-9, "nothing"), (100, "everything")):
        with pytest.raises(ValueError, match=f"adapter.threshold={threshold:g} selects {what}"):
            make(toys, tmp_path, teacher, adapter=dict(threshold=threshold))
    with pytest.raises(ValueError, match="adapter.target_modules='to_q' matches no layer of DiT; its layers end in"):
        make(toys, tmp_path, teacher, adapter=dict(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="threshold=0.05 and num_params=3 both select"):
        make(toys, tmp_path, teacher, adapter=dict(num_params=3))
    decayed = ADAMW | dict(weight_decay=0.01)
    with pytest.raises(ValueError, match="optimizer.weight_decay=0.01: it would move the weights that adapter.prog"):
        make(toys, tmp_path, teacher, optimizer=decayed)
    toys.run(make(toys, tmp_path / "a", teacher, optimizer=decayed, adapter=dict(progressive_ratio=None)), stop=4)
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"changes of other places: .*; settings that differ: adapter.threshold \(0.05 -> 0.06\)",
    ):
        other = dict(progressive_ratio=None, threshold=0.06)
        make(toys, tmp_path / "a", teacher, optimizer=decayed, adapter=other, resume="latest")
    config = TrainConfig(**json.loads(json.dumps(toys.settings(tmp_path)))).model_copy(
        update=dict(adapter=make(toys, tmp_path / "b", teacher).config.adapter)
    )
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ValueError, match=f"{kind.value}: adapter.kind=sara writes single entries of whole weights"):
            machine.check(SimpleNamespace(distributed_type=kind), config, SimpleNamespace(roles={}), [])
