"""The commands that would measure again what results record."""

import inspect
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.eval.metrics.base import PACKAGE, Metric
from genkit.eval.report import Code
from genkit.eval.runs import Run
from genkit.registry import members

_PACKAGES = {"genkit": "genkit-diffusion"}


def metric_text(name: str, settings: Mapping[str, Any]) -> str:
    """A metric of a protocol as ``--metrics`` takes it: ``kid:subset_size=100``, without settings that are default."""
    base, _, argument = name.partition(":")
    cls = members(PACKAGE, Metric).get(base)  # type: ignore[type-abstract]
    if cls is None or argument:
        return name
    defaults = {k: p.default for k, p in inspect.signature(cls).parameters.items()}
    changed = [f"{k}={v}" for k, v in settings.items() if k in defaults and v != defaults[k]]
    return base + (":" + ",".join(changed) if changed else "")


def run_command(run: Run) -> str:
    """``genkit eval run`` with what the protocol records; sources stand there by the names that it has for them."""
    protocol = run.result.protocol
    metrics = ",".join(metric_text(name, settings) for name, settings in protocol.metrics.items())
    words = ["genkit", "eval", "run", protocol.reference or "none", protocol.generated]
    words += ["--extractor", protocol.extractor.partition("/")[0], "--metrics", metrics]
    if run.result.nfe is not None:
        words += ["--nfe", f"{run.result.nfe:g}"]
    return shlex.join([*words, "--seed", str(protocol.seed), "--device", protocol.device])


def run_commands(runs: Sequence[Run]) -> list[tuple[str, Code]]:
    """What measures the runs again, under what it does."""
    lines = [run_command(run) for run in runs]
    return [("The evaluations", Code("\n".join(dict.fromkeys(lines))))]


def report_command(
    paths: Sequence[str | Path],
    html_path: str | Path,
    *,
    metrics: str | None,
    mmhm: str | None,
    title: str | None,
    force: bool,
) -> str:
    """``genkit eval report`` as it was called."""
    words = ["genkit", "eval", "report", *map(str, paths), "--html", str(html_path)]
    for option, value in (("--metrics", metrics), ("--mmhm", mmhm), ("--title", title)):
        words += [option, value] if value is not None else []
    return shlex.join(words + (["--force"] if force else []))


def install(runs: Sequence[Run]) -> str:
    """The versions that measured, as a command that installs them; one line for every set of versions."""
    lines = []
    for run in runs:
        versions = dict(run.result.protocol.versions)
        python = versions.pop("python", None)
        wanted = " ".join(f'"{_PACKAGES.get(name, name)}=={version}"' for name, version in versions.items())
        lines.append(f"pip install {wanted}" + (f"  # Python {python}" if python else ""))
    return "\n".join(dict.fromkeys(lines))
