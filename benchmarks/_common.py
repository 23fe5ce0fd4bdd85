"""What every benchmark needs: paired timing, one table, a JSON file with versions and device, and --check."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table

import genkit

RESULTS = Path(__file__).parent / "results"


def paired(candidates: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call: the candidates take turns, so that what else the machine does falls on all alike."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for r in range(rounds):
        names = list(candidates)
        for name in names if r % 2 == 0 else reversed(names):
            synchronise()
            start = time.perf_counter()
            candidates[name]()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: dict[str, list[float]], of: str, to: str) -> float:
    """Median over rounds of the ratio of two candidates timed in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))


def report(name: str, rows: list[dict[str, Any]], bounds: dict[str, tuple[float, float]]) -> None:
    """Print ``rows``, write ``results/NAME.json``, and with ``--check`` exit 1 if a value exceeds its bound.

    ``bounds`` is ``{what: (measured, at most)}``.
    """
    parser = argparse.ArgumentParser(description=f"Measure {name}.")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bound does not hold")
    check = parser.parse_args().check
    columns = list(rows[0])
    table = Table(*columns, title=name, title_justify="left")
    for row in rows:
        table.add_row(*(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    held = {what: value <= most for what, (value, most) in bounds.items()}
    for what, (value, most) in bounds.items():
        console.print(
            f"{what}: {value:.3f} (at most {most}) {'holds' if held[what] else 'DOES NOT HOLD'}", highlight=False
        )
    cuda = torch.cuda.is_available()
    record = {
        "rows": rows,
        "bounds": {what: {"measured": value, "at_most": most} for what, (value, most) in bounds.items()},
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"genkit": genkit.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if check and not all(held.values()):
        sys.exit(1)
