"""Everything that wants a GPU: measurements, the kernels' tests as compiled, and checks against the CPU; one table.

    python benchmarks/gpu/run.py
    python benchmarks/gpu/run.py --device cpu        the script itself, on tiny inputs
    python benchmarks/gpu/run.py attention tests     these parts alone

Each part runs in a process of its own, so that one that breaks the device's context does not take the others along, and
has a share of nine minutes, and what earlier ones left of theirs. What was measured until then is in the table.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _measure import Row, main

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "attention": "benchmarks/gpu/attention.py",
    "training_step": "benchmarks/gpu/training_step.py",
    "fused": "benchmarks/gpu/fused.py",
    "checks": "tests/gpu/run.py",
    "tiles": "benchmarks/gpu/tiles.py",
}
# Seconds, in the order in which they run.
SHARES = {"attention": 190, "training_step": 90, "fused": 50, "tests": 100, "checks": 50, "tiles": 60}
# Their bodies are interpreted where there is no GPU, and compiled where there is one.
KERNELS = [path for path in ROOT.glob("tests/**/test_triton_*.py") if "compiles" not in path.name]
TESTS = [*sorted(KERNELS), ROOT / "tests/attention/test_torch_facts.py", ROOT / "tests/training/test_ema.py"]


def part(name: str, device: str, limit: float) -> Iterator[Row]:
    """Rows of a script, as far as it got."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        options = ["--device", device, "--output", str(file), "--seconds", str(limit - 5)]
        try:
            code: object = subprocess.run([sys.executable, SCRIPTS[name], *options], cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = f"none, {limit:.0f} s were over"
        record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": [], "complete": False}
    for row in record["rows"]:
        row.pop("holds")
        yield Row(**row)
    if not record["complete"]:
        yield Row(f"{name} came to its end", None, "", 1.0, note=f"exit code: {code}")


def tests(limit: float) -> Iterator[Row]:
    """How many of the kernels' tests fail."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-m", "not slow", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):  # most of the time kernels are compiled
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    try:
        done = subprocess.run([*command, *TESTS], cwd=ROOT, timeout=limit, capture_output=True, text=True)
        last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
        failed = sum(int(n) for n in re.findall(r"(\d+) (?:failed|error)", last)) or int(done.returncode != 0)
        print(done.stdout[-6000:] if failed else last, flush=True)
    except subprocess.TimeoutExpired as error:
        failed, last = None, f"{limit:.0f} s were over"
        said = error.stdout or b""
        print((said if isinstance(said, str) else said.decode(errors="replace"))[-2000:], flush=True)
    yield Row("tests of the kernels that fail", failed, "", 0.0, at_least=False, note=last)


def rows(device: str, wanted: set[str]) -> Iterator[Row]:
    end = time.monotonic()
    for name in SHARES:
        if wanted and name not in wanted or name == "tests" and not device.startswith("cuda"):
            continue
        end += SHARES[name] if device.startswith("cuda") else 600
        limit = end - time.monotonic()
        yield from tests(limit) if name == "tests" else part(name, device, limit)


if __name__ == "__main__":
    wanted = {argument for argument in sys.argv[1:] if argument in SHARES}
    sys.argv = [argument for argument in sys.argv if argument not in SHARES]
    sys.exit(main("all", __doc__.splitlines()[0], lambda device: rows(device, wanted)))
