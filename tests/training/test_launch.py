"""Runs in processes of their own: killed, and spread over two."""

import json
import socket
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from genkit.registry import members
from genkit.training import logs
from genkit.training.compare import first_difference
from genkit.training.objectives._reward import RewardObjective
from tests.training.processes import kill_at_a_checkpoint, start


def test_killed_run_goes_on_bit_for_bit(toys, tmp_path):
    # A schedule that does not depend on where the run ends, so that the killed one cannot end by itself.
    changes = dict(lr_scheduler="constant_with_warmup", global_batch_size=16)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(toys.settings(tmp_path / "killed", **changes, max_train_steps=10**6)))
    step = kill_at_a_checkpoint(recipe, tmp_path / "killed")
    changes["max_train_steps"] = step + 10
    resumed = toys.run(toys.digits(tmp_path / "killed", resume="latest", **changes))
    toys.run(toys.digits(tmp_path / "whole", **changes))
    a, b = (logs.read(tmp_path / name / logs.FILE) for name in ("killed", "whole"))
    assert resumed.step == step + 10 and a == b
    for name in ("student.safetensors", "student.ema.safetensors"):
        ours, theirs = (load_file(tmp_path / run / f"checkpoint-{step + 10}" / name) for run in ("killed", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_two_processes_equal_one(toys, tmp_path):
    """Losses that follow a first update, and weights that agree, show that gradients were synchronised."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch += f" --main_process_port {port}"
    script, teacher = Path(__file__).with_name("toys.py"), toys.teacher(tmp_path / "teacher")
    process = start("-m", "accelerate.commands.launch", *launch.split(), script, tmp_path / "two", teacher)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    report = json.loads((tmp_path / "two/report.json").read_text())
    assert report["processes"] == 2 and set(report["spread"].values()) == {0.0}
    toys.parallel(tmp_path / "one", teacher)
    for name in (*toys.STRICT, "adversarial"):
        one, two = (logs.read(tmp_path / run / name / logs.FILE) for run in ("one", "two"))
        assert len(one) == 6 and first_difference(one, two, 1e-5) is None, (name, first_difference(one, two, 1e-5))
        norms = [[v for line in run for k, v in line.items() if k.startswith("grad_norm")] for run in (one, two)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4), name
    strategies = members("genkit.training.objectives", RewardObjective)
    for name in toys.PARALLEL:
        one, two = (logs.read(tmp_path / run / name / logs.FILE) for run in ("one", "two"))
        assert len(one) == len(two) == 4
        for a, b in zip(one, two, strict=True):
            for key in (k for k in a if k.startswith("loss")):
                limit = (1e-6 if toys.PARALLEL[name][0] in strategies else 1e-5) * max(1, abs(a[key]))
                assert abs(a[key] - b[key]) <= limit, (name, a["step"], key, a[key], b[key])
        # The first update has no learning rate, so that these are of the same weights.
        norms = [[v for line in run[:2] for k, v in line.items() if k.startswith("grad_norm")] for run in (one, two)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4), name
