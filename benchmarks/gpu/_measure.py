"""What the GPU benchmarks share: a row of the table, time and memory of a call, the table and the command."""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import genkit

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Row:
    """One measurement. ``bound`` is the least (``at_least``) or the most that it may be, if any."""

    what: str
    value: float
    unit: str
    bound: float | None = None
    at_least: bool = True
    note: str = ""

    @property
    def holds(self) -> bool | None:
        if self.bound is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def seconds(run: Callable[[], Any], device: str, *, budget: float = 0.3) -> float:
    """Median time of a call, after warming up, over as many calls as fit in ``budget`` seconds (at least 5)."""
    if not device.startswith("cuda"):
        run()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    for _ in range(3):
        run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    rounds = max(5, min(100, int(budget / max(start.elapsed_time(stop) / 1e3, 1e-6))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) / 1e3


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Memory that a call needs beyond what there is before it; 0 where it cannot be measured."""
    if not device.startswith("cuda"):
        run()
        return 0
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def attempt(what: str, unit: str, measure: Callable[[], Row]) -> Row:
    """``measure()``; one that breaks must not hide the others, and does not count as holding."""
    try:
        return measure()
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return Row(what, float("nan"), unit, 0.0, note=said[:100])


def shown(name: str, rows: Sequence[Row], device: str) -> None:
    """Print the table."""
    label = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    columns = ("what", "measured", "unit", "must be", "holds", "note")
    printed = Table(*columns, title=f"{name}, {label}", title_justify="left")
    for row in rows:
        wanted = "" if row.bound is None else f"{'>=' if row.at_least else '<='} {row.bound:.4g}"
        holds = "" if row.holds is None else "yes" if row.holds else "NO"
        printed.add_row(row.what, f"{row.value:.4g}", row.unit, wanted, holds, row.note)
    Console(width=180).print(printed)


def written(name: str, rows: Sequence[Row], device: str, output: Path | None) -> None:
    """Write ``output``, by default ``results/gpu_NAME_DEVICE.json``, or nothing where there is no GPU."""
    cuda = device.startswith("cuda")
    label = torch.cuda.get_device_name() if cuda else "cpu"
    if output is None and cuda:
        output = RESULTS / f"gpu_{name}_{re.sub(r'[^A-Za-z0-9]+', '-', label).strip('-').lower()}.json"
    if output is not None:
        versions = {"genkit": genkit.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
        record = {"device": label, "versions": versions, "rows": [asdict(r) | {"holds": r.holds} for r in rows]}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(name: str, about: str, rows: Callable[[str], Iterator[Row]]) -> int:
    """A script: each row as soon as it is measured, then the table; the exit code is 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file; by default below benchmarks/results, of a GPU only")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu runs the script itself, on tiny inputs", file=sys.stderr)
        return 2
    found = []
    for row in rows(given.device):
        print(f"{row.what}: {row.value:.4g} {row.unit} {'' if row.holds is None else row.holds} {row.note}", flush=True)
        found.append(row)
        written(name, found, given.device, given.output)  # a run that is cut off leaves what it knew
    shown(name, found, given.device)
    return int(any(row.holds is False for row in found))
