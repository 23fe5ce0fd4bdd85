"""The commands that would measure again what results record."""

import inspect
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.eval.extractors.base import Extractor
from genkit.eval.metrics.base import PACKAGE, Metric
from genkit.eval.report import Code
from genkit.eval.runs import COSTS, NO_GUIDER, Run
from genkit.registry import members

EXTRACTORS = "genkit.eval.extractors"
# What a run was made with that is no argument of the pipeline's call.
_OTHERS = {"model", "steps", "seed", "guider", "scheduler", "training_step", *COSTS}
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


def extractor_text(id: str) -> str:
    """An extractor of a protocol, by its id ``name/rule/weights``, as ``--extractor`` takes it."""
    name, _, rest = id.partition("/")
    known = {stem.replace("_", "-"): (stem, cls) for stem, cls in members(EXTRACTORS, Extractor).items()}  # type: ignore[type-abstract]
    stems = [stem for stem in known if name == stem or name.startswith(stem + "-")]
    if not stems:
        return id
    file, cls = known[max(stems, key=len)]
    rule = rest.partition("/")[0]
    for setting, parameter in inspect.signature(cls).parameters.items():
        if setting in ("resize", "mode") and rule != parameter.default:
            return f"{file}:{setting}={rule}"
    return file


def run_command(run: Run) -> str:
    """The command that was called; of a cell of a sweep, and of what Python evaluated, ``genkit eval run`` with what is
    recorded: models and sources by the names that it has for them.
    """
    if run.result.command is not None:
        return run.result.command
    protocol, made = run.result.protocol, run.settings
    metrics = ",".join(metric_text(name, settings) for name, settings in protocol.metrics.items())
    words = ["genkit", "eval", "run", protocol.reference or "none"]
    seed = protocol.seed
    if made.get("model") is not None and made.get("seed", made.get("steps")) is not None:
        words.append(f"pipeline:{made['model']}")
        words += ["--steps", str(made["steps"])] if made.get("steps") is not None else []
        guider, scale = made.get("guider"), made.get("guidance_scale")
        if guider == "embedded":
            words += ["--set", f"guidance_scale={scale}"]
        elif guider not in NO_GUIDER:
            joint = "," if ":" in guider else ":"
            words += ["--guider", guider if scale is None else f"{guider}{joint}guidance_scale={scale}"]
        if made.get("scheduler") is not None:
            words += ["--scheduler", str(made["scheduler"])]
        elif guider is None:  # of a network that is no denoiser, which takes all its settings as arguments
            told = [f"{k}={v!r}" for k, v in made.items() if v is not None and k not in _OTHERS]
            words += ["--set", ",".join(told)] if told else []
        words += ["--n", str(protocol.n_gen)] if protocol.n_gen is not None else []
        seed = made.get("seed", seed)
    else:
        words.append(protocol.generated)
        words += ["--nfe", f"{run.result.nfe:g}"] if run.result.nfe is not None else []
    words += ["--extractor", extractor_text(protocol.extractor), "--metrics", metrics, "--seed", str(seed)]
    return shlex.join([*words, "--device", protocol.device])


def run_commands(runs: Sequence[Run]) -> list[tuple[str, Code]]:
    """What measures the runs again, under what it does."""
    lines = dict.fromkeys(run_command(run) for run in runs)
    return [("Each evaluation, with the folders of its sources in place of their names", Code("\n".join(lines)))]


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
        # Without what follows a plus sign: builds, such as for a version of CUDA, that the index does not have.
        plain = {_PACKAGES.get(name, name): version.partition("+")[0] for name, version in versions.items()}
        wanted = " ".join(f'"{name}=={version}"' for name, version in plain.items())
        lines.append(f"pip install {wanted}" + (f"  # Python {python}" if python else ""))
    return "\n".join(dict.fromkeys(lines))
