"""What the GPU benchmarks share: a row of the table, time and memory of a call, the table and the command."""

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """One measurement, ``None`` where there is none. ``bound``: the least (``at_least``) or most that it may be."""

    what: str
    value: float | None
    unit: str
    bound: float | None = None
    at_least: bool = True
    note: str = ""

    @property
    def holds(self) -> bool | None:
        if self.bound is None:
            return None
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def seconds(run: Callable[[], Any], device: str, *, budget: float = 0.3) -> float:
    """Median time of a call, after warming up, over as many calls as fit in ``budget`` seconds (at least 3).

    Before each call more than the cache holds is written, which also lets the host be ahead of the device: what is
    measured is the device's time wherever that is more than the host's.
    """
    if not device.startswith("cuda"):
        run()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    run()  # compiles
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    rounds = max(3, min(50, int(budget / (time.perf_counter() - start))))
    cache = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for before, after in events:
        cache.zero_()
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


def sections(parts: Iterable[tuple[str, Callable[[], Iterable[Row]]]]) -> Iterator[Row]:
    """Rows of each part by its name; one that breaks must not hide the others, and does not count as holding."""
    for name, part in parts:
        said = ""
        try:
            yield from part()
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        if said:  # after the error is gone, which holds what was computed
            yield Row(f"{name}: broke off", None, "", 0.0, note=said)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def shown(name: str, rows: Sequence[Row], device: str) -> None:
    """Print the table."""
    label = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    columns = ("what", "measured", "unit", "must be", "holds", "note")
    printed = Table(*columns, title=f"{name}, {label}", title_justify="left")
    for row in rows:
        wanted = "" if row.bound is None else f"{'>=' if row.at_least else '<='} {row.bound:.4g}"
        holds = "" if row.holds is None else "yes" if row.holds else "NO"
        printed.add_row(row.what, "-" if row.value is None else f"{row.value:.4g}", row.unit, wanted, holds, row.note)
    Console(width=180).print(printed)


def written(name: str, rows: Sequence[Row], device: str, output: Path | None, complete: bool = False) -> None:
    """Write ``output``, by default ``results/gpu_NAME_DEVICE.json``, or nothing where there is no GPU."""
    cuda = device.startswith("cuda")
    label = torch.cuda.get_device_name() if cuda else "cpu"
    if output is None and cuda:
        output = RESULTS / f"gpu_{name}_{re.sub(r'[^A-Za-z0-9]+', '-', label).strip('-').lower()}.json"
    if output is not None:
        versions = {"genkit": genkit.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
        record: dict[str, Any] = {"device": label, "complete": complete, "versions": versions}
        record["rows"] = [asdict(r) | {"holds": r.holds} for r in rows]
        output.parent.mkdir(parents=True, exist_ok=True)
        begun = output.with_suffix(".begun")  # whoever ends this process finds a whole file
        begun.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        begun.replace(output)


def main(name: str, about: str, rows: Callable[[str], Iterator[Row]], limit: float = 3600) -> int:
    """A script: each row as soon as it is measured, then the table; the exit code is 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file; by default below benchmarks/results, of a GPU only")
    parser.add_argument("--seconds", type=float, default=limit, help="nothing more is begun after as many")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu runs the script itself, on tiny inputs", file=sys.stderr)
        return 2
    found: list[Row] = []
    end = time.perf_counter() + given.seconds

    def add(row: Row) -> None:
        value = "-" if row.value is None else f"{row.value:.4g} {row.unit}"
        print(f"{row.what}: {value} {'' if row.holds is None else row.holds} {row.note}", flush=True)
        found.append(row)
        written(name, found, given.device, given.output)  # a run that is cut off leaves what it knew

    for row in rows(given.device):
        add(row)
        if time.perf_counter() > end:
            add(Row(f"{name}: everything was measured", None, "", 1.0, note=f"{given.seconds:.0f} s were over"))
            break
    written(name, found, given.device, given.output, complete=True)
    shown(name, found, given.device)
    return int(any(row.holds is False for row in found))
