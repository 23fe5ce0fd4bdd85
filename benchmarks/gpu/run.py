"""Everything that wants a GPU: checks against the CPU, the kernels' tests as compiled, and all measurements; one table.

    python benchmarks/gpu/run.py
    python benchmarks/gpu/run.py --device cpu    the script itself, on tiny inputs

Each part runs in a process of its own, so that one that breaks the device's context does not take the others along.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from _measure import Row, main

ROOT = Path(__file__).parents[2]
PARTS = ("tests/gpu/run.py", *(f"benchmarks/gpu/{name}.py" for name in ("attention", "training_step", "fused")))
# Their bodies are interpreted where there is no GPU, and compiled where there is one.
KERNELS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_triton_*.py"))
OTHERS = [path for path in KERNELS if not path.startswith("tests/attention/")]
TESTS = ("tests/attention", "tests/training/test_ema.py", *OTHERS)
LIMIT = 480  # seconds a part


def part(script: str, device: str) -> Iterator[Row]:
    """Rows of a script, as far as it got."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [sys.executable, str(ROOT / script), "--device", device, "--output", str(file)]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=LIMIT).returncode
        except subprocess.TimeoutExpired:
            code = -1
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for row in rows:
        row.pop("holds")
        yield Row(**row)
    if code not in (0, 1):
        yield Row(f"{script} came to its end", 0.0, "", 1.0, note=f"exit code {code}, -1: {LIMIT} s were over")


def tests(device: str) -> Iterator[Row]:
    """How many of the kernels' tests fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *TESTS]
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=LIMIT, capture_output=True, text=True)
        last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
        failed = sum(int(n) for n in re.findall(r"(\d+) (?:failed|error)", last))
        failed = failed or int(done.returncode != 0)
        print(done.stdout[-6000:] if failed else last)
    except subprocess.TimeoutExpired:
        failed, last = 1, f"{LIMIT} s were over"
    yield Row("tests of the kernels that fail", failed, "", 0.0, at_least=False, note=last)


def rows(device: str) -> Iterator[Row]:
    if device.startswith("cuda"):
        yield from tests(device)
    for script in PARTS:
        yield from part(script, device)


if __name__ == "__main__":
    sys.exit(main("all", __doc__.splitlines()[0], rows))
