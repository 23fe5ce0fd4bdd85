"""What a run tells while it runs."""

import logging
import sys

import pytest
import torch
from accelerate import Accelerator

from genkit.training import logs


@pytest.mark.parametrize(("quiet", "terminal"), [(False, False), (True, False), (False, True)])
def test_without_a_terminal_there_are_lines(quiet, terminal, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    metrics = logs.Metrics(Accelerator(cpu=True), tmp_path, 0, 4, quiet)
    with caplog.at_level(logging.INFO, "genkit.training"):
        for step in (1, 2, 3, 4):
            values = {"loss": torch.tensor(0.5 / step), "grad_norm/student": 9.0, "loss/student": 0.25}
            metrics.add(step, values | {"reward": -1.5, "reward/jpeg": torch.tensor(-3.0), "lr/student": 1e-4})
            if step % 2 == 0:
                metrics.flush()
        metrics.flush()  # nothing to say
    metrics.close()
    tail = "loss/student 0.25, reward -1.5, reward/jpeg -3"
    lines = [f"step 2 of 4: loss 0.25, {tail}", f"step 4 of 4: loss 0.125, {tail}"]
    assert caplog.messages == ([] if quiet or terminal else lines)
    bar = capsys.readouterr().err
    assert ("loss=0.125, loss/student=0.25, reward=-1.5" in bar) == terminal and "grad_norm" not in bar
