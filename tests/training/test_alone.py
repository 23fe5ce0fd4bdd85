"""What the main process measures by itself, while the others go on or wait."""

import importlib.util
import json
from pathlib import Path

_spec = importlib.util.spec_from_file_location("sweeping", Path(__file__).parents[1] / "eval" / "sweeping.py")
sweeping = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweeping)


def _trained(rank, toys, folder):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    sampling = dict(every=1, num_samples=8, num_inference_steps=1, evaluate="digits")
    toys.run(toys.digits(folder, max_train_steps=2, checkpointing_steps=2, sampling=sampling))


def test_samples_are_evaluated_on_one_process_of_two(toys, tmp_path):
    """The other one must not be waited for: it is at the next step already."""
    toys.run(toys.digits(tmp_path / "warm", max_train_steps=1, checkpointing_steps=1))  # imports, once
    sweeping.launch(2, _trained, toys, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all("eval/frechet_distance" in line for line in lines)
