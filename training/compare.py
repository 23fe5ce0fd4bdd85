"""``python -m genkit.training.compare A B``: the first step at which two runs differ.

A and B are run folders, their ``metrics.jsonl``, or configs; a config is run first, in a temporary folder.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from genkit.training import logs


class Difference(NamedTuple):
    """The first value at which two runs part."""

    step: int
    key: str
    a: float | None
    b: float | None


def first_difference(a: list[dict], b: list[dict], tolerance: float = 0.0) -> Difference | None:
    """The first step at which a loss differs by more than ``tolerance`` (relative), or that only one run has.

    Losses are the values whose name begins with ``loss``; NaN equals NaN.
    """
    for one, other in zip(a, b, strict=False):
        if one["step"] != other["step"]:
            return Difference(int(min(one["step"], other["step"])), "step", one["step"], other["step"])
        for key in sorted(k for k in {*one, *other} if k.startswith("loss")):
            x, y = one.get(key), other.get(key)
            if x is None or y is None or not _equal(x, y, tolerance):
                return Difference(int(one["step"]), key, x, y)
    if len(a) != len(b):
        longer = (a if len(a) > len(b) else b)[min(len(a), len(b))]
        x, y = (longer["step"], None) if len(a) > len(b) else (None, longer["step"])
        return Difference(int(longer["step"]), "step", x, y)
    return None


def _equal(x: float, y: float, tolerance: float) -> bool:
    return x == y or (math.isnan(x) and math.isnan(y)) or abs(x - y) <= tolerance * max(abs(x), abs(y))


def _metrics(run: str, overrides: Sequence[str], folder: Path) -> list[dict]:
    path = Path(run)
    if path.suffix in (".yaml", ".yml"):
        from genkit.training.__main__ import train
        from genkit.training.config import load_config

        train(load_config(path, [*overrides, f"output_dir={folder}", "resume=null"]), quiet=True)
        path = folder
    elif overrides:
        raise ValueError(f"overrides {list(overrides)} change configs, but {run!r} is the folder of a run")
    file = path / logs.FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {run!r} is neither a config nor the folder of a run")
    return logs.read(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the first difference; exit status 0 if there is none, 1 if there is one, 2 on bad input."""
    parser = argparse.ArgumentParser("python -m genkit.training.compare", description=__doc__)
    parser.add_argument("a", help="a config (.yaml), a run's folder or its metrics.jsonl")
    parser.add_argument("b", help="the other one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of both configs")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference that counts as none")
    arguments = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            a, b = (
                _metrics(r, arguments.overrides, Path(folder, str(i))) for i, r in enumerate((arguments.a, arguments.b))
            )
        except (ValueError, FileNotFoundError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    difference = first_difference(a, b, arguments.tolerance)
    if difference is None:
        print(f"no difference in {len(a)} steps")
        return 0
    print(f"first difference at step {difference.step}: {difference.key} is {difference.a} and {difference.b}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
