"""What a run writes down: ``metrics.jsonl`` always, trackers by name, a bar in a terminal or else lines."""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from genkit.registry import unknown

FILE = "metrics.jsonl"
logger = logging.getLogger("genkit.training")


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that accelerate does not know or that are not installed."""
    available = [str(t) for t in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(unknown("report_to", name, LOGGER_TYPE_TO_CLASS))
        if name not in available:
            raise ValueError(f"report_to={name!r} is not installed; install it with: pip install {name}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.key``, in types that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat


class Metrics:
    """Values of every step, kept on the device until :meth:`flush`, which writes one line of JSON a step.

    Means over processes; a value that only some of them have is averaged over those. Numbers are written in full, so
    that two runs can be compared bit for bit.

    Args:
        folder: where ``metrics.jsonl`` is; lines after ``start_step`` are dropped from it.
        total: steps of the whole run, for the bar.
        quiet: neither bar nor lines.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, start_step: int, total: int, quiet: bool):
        self.accelerator = accelerator
        self.path = folder / FILE
        self._pending: list[tuple[int, dict[str, Tensor | float]]] = []
        main = accelerator.is_main_process
        if main:
            truncate(self.path, start_step)
        hidden = not main or quiet or not sys.stderr.isatty()
        self._tells = main and not quiet and hidden
        self._total = total
        self.bar = tqdm(initial=start_step, total=total, desc="training", unit="step", disable=hidden)
        self._clock, self._steps = time.perf_counter(), 0

    def add(self, step: int, values: dict[str, Tensor | float]) -> None:
        """Keep the values of ``step``; scalar tensors stay where they are."""
        self._pending.append((step, values))
        self._steps += 1
        self.bar.update()

    def flush(self) -> list[dict[str, float]]:
        """Write what is pending, everywhere at once (every process must call); returns the lines."""
        lines = [{"step": step, **v} for (step, _), v in zip(self._pending, self._numbers(), strict=True)]
        self._pending.clear()
        if self.accelerator.num_processes > 1:
            several = gather_object([lines])
            lines = [_mean([rank[i] for rank in several]) for i in range(len(lines))]
        if not lines or not self.accelerator.is_main_process:
            return lines
        with open(self.path, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        now = time.perf_counter()
        speed = {"steps_per_second": self._steps / (now - self._clock)}
        self._clock, self._steps = now, 0
        last = {k: v for k, v in lines[-1].items() if k != "step"}
        self.accelerator.log(last | speed, step=int(lines[-1]["step"]))
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in last.items() if k.startswith("loss") or k == "reward"})
        if self._tells:
            told = (f"{k} {v:.4g}" for k, v in last.items() if re.match(r"(loss|reward)(/|$)", k))
            logger.info("step %d of %d: %s", lines[-1]["step"], self._total, ", ".join(told))
        return lines

    def _numbers(self) -> list[dict[str, float]]:
        """The pending values as floats, with one copy from the device for all."""
        tensors = [v for _, values in self._pending for v in values.values() if isinstance(v, Tensor)]
        numbers = iter(torch.stack([t.detach().double() for t in tensors]).tolist() if tensors else [])
        return [
            {k: next(numbers) if isinstance(v, Tensor) else v for k, v in values.items()} for _, values in self._pending
        ]

    def close(self) -> None:
        self.bar.close()


def truncate(path: Path, step: int) -> None:
    """Drop the lines after ``step``, and a last line that was cut while being written."""
    if path.is_file():
        path.write_text("".join(json.dumps(line) + "\n" for line in read(path) if line["step"] <= step))


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl``, without a last one that was cut while being written."""
    lines = path.read_text().splitlines()
    parsed = []
    for i, line in enumerate(lines):
        try:
            parsed.append(json.loads(line))
        except ValueError:
            if i < len(lines) - 1:
                raise ValueError(f"{path} line {i + 1} is not JSON: {line[:60]!r}") from None
    return parsed


def _mean(dicts: list[dict[str, float]]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for key in dict.fromkeys(k for d in dicts for k in d):
        values = [d[key] for d in dicts if key in d]
        merged[key] = values[0] if key == "step" else sum(values) / len(values)
    return merged
