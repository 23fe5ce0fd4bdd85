"""Runs in processes of their own: started, killed, and held against one that runs here."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from genkit.training import checkpoint, logs
from genkit.training.compare import first_difference

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_at_a_checkpoint(recipe, folder):
    """Trains by ``recipe`` until ``folder`` has a checkpoint; the step of the last one there when it was killed."""
    process = start("-m", "genkit.training", recipe, "--quiet")
    try:
        deadline = time.monotonic() + 240
        while not checkpoint.found(folder):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    return max(checkpoint.found(folder))


def check_bf16(toys, tmp_path, settings):
    """The run in ``two`` of six steps in bf16 is that of ``settings`` in one process, with weights in float32."""
    toys.run(toys.digits(tmp_path / "one", **settings))
    AcceleratorState._reset_state()
    toys.run(toys.digits(tmp_path / "float32", **settings | dict(mixed_precision="no")))
    ours, theirs, exact = (logs.read(tmp_path / name / logs.FILE) for name in ("two", "one", "float32"))
    assert first_difference(ours, theirs, 1e-4) is None, first_difference(ours, theirs, 1e-4)
    norm = pytest.approx(theirs[0]["grad_norm/student"], rel=1e-5)
    assert ours[0]["grad_norm/student"] == norm and exact[0]["grad_norm/student"] != norm
    weights = load_file(tmp_path / "two" / "checkpoint-6" / "student.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
