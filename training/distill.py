"""``genkit distill``: a model in, one of few steps out, by any method that has a recipe.

A recipe says of itself by which name it is found, and for which models (``distill`` in its YAML): a new method is a new
recipe, and this file does not change.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table

from genkit._files import first_line
from genkit.adapters import fuse
from genkit.denoisers import TwoTime
from genkit.hub import model_card
from genkit.pipelines.few_step import FewStepPipeline
from genkit.registry import unknown
from genkit.training.adapters import base_network
from genkit.training.build import Run, build
from genkit.training.calls import counting
from genkit.training.card import base_model, usage
from genkit.training.config import TrainConfig, load_config
from genkit.training.export import export, save_pipeline
from genkit.training.few_steps import measure_few_steps
from genkit.training.interrupt import Stopped
from genkit.training.memory import footprints
from genkit.training.objectives.base import DivergedError
from genkit.training.trainer import Trainer


@dataclass(frozen=True)
class Recipe:
    """A file below ``configs/`` with what its ``distill`` section says."""

    method: str
    pipelines: tuple[str, ...]
    path: Path


def recipes(folder: Path) -> list[Recipe]:
    """The recipes below ``folder`` that have a ``distill`` section."""
    found = []
    for path in sorted(folder.rglob("*.yaml")):
        section = yaml.safe_load(path.read_text(encoding="utf-8")).get("distill")
        if section is not None:
            found.append(Recipe(section["method"], tuple(section.get("pipelines", ())), path))
    return found


def choose(known: Sequence[Recipe], method: str, pipeline: str) -> Recipe:
    """The recipe of ``method`` for teachers in a ``pipeline`` of this class, or else for any.

    Raises:
        ValueError: an unknown method, with the nearest known one; a method without recipe for such teachers.
    """
    of_method = [r for r in known if r.method == method]
    if not of_method:
        raise ValueError(unknown("method", method, {r.method for r in known}))
    fitting = [r for r in of_method if pipeline in r.pipelines] or [r for r in of_method if not r.pipelines]
    if not fitting:
        accepted = sorted(p for r in of_method for p in r.pipelines)
        raise ValueError(
            f"method={method!r} has no recipe for the teacher's {pipeline}; there are recipes for {', '.join(accepted)}"
        )
    return fitting[0]


def settings(recipe: Recipe, teacher: str, output: Path, overrides: Sequence[str], **given: Any) -> TrainConfig:
    """The recipe's settings with the teacher in its places, then what was ``given``, then ``overrides``.

    Raises:
        ValueError, FileNotFoundError: as :func:`genkit.training.config.load_config`.
    """
    raw = yaml.safe_load(recipe.path.read_text(encoding="utf-8"))
    changes = [f"output_dir={output}", "resume=latest", f"model.pretrained={teacher}"]
    if raw.get("teacher") is not None:
        changes.append(f"teacher={teacher}")
    if given.get("adapter") is not None:
        changes.append(f"adapter.kind={given['adapter']}")
    if given.get("steps") is not None:
        changes.append(f"max_train_steps={given['steps']}")
    if given.get("data") is not None:
        changes += _data(str(given["data"]), raw["data"])
    return load_config(recipe.path, [*changes, *overrides])


def _data(value: str, section: dict[str, Any]) -> list[str]:
    """``--data``: a folder of pictures or pairs, a file of prompts, or the name of a source."""
    if Path(value).is_dir():
        return [f"data.path={value}"] if "path" in section else ["data=image_folder", f"data.path={value}"]
    if Path(value).is_file():
        return ["data=prompts", f"data.file={value}"]
    return [f"data={value}"]


def distill(
    teacher: str,
    method: str,
    output: Path,
    *,
    adapter: str | None = None,
    data: str | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Path:
    """Train a student of ``teacher``, measure it at few steps, and save ``output/pipeline``, which is returned.

    Run again, it goes on from the last checkpoint in ``output``.

    Args:
        teacher: a pipeline's folder, or ``owner/name`` on the Hub.
        method: one that a recipe is named for.
        adapter: ``lora``, ``sara`` or ``full`` in place of the recipe's choice.
        data: a folder of pictures (or of what else the recipe reads), a file with a prompt a line, or a source's name.
        steps: training steps in place of the recipe's.
        overrides: further settings, ``section.key=value``.

    Raises:
        ValueError, FileNotFoundError: what cannot be trained, before any training.
        DivergedError, CheckpointError, Stopped: as :class:`genkit.training.trainer.Trainer`.
    """
    console = Console(quiet=quiet, soft_wrap=True, highlight=False, width=max(100, Console().width))
    with resources.as_file(resources.files("genkit.configs")) as folder:
        recipe = choose(recipes(folder), method, _pipeline_class(teacher))
        config = settings(recipe, teacher, output, overrides, adapter=adapter, data=data, steps=steps)
        where = recipe.path.relative_to(folder)
    run = build(config)
    console.print(f"{method} by configs/{where.as_posix()}: {type(run.objective).__name__}, {type(run.pipe).__name__}")
    _announce(console, run)
    source, pipeline = run.source, output / "pipeline"
    metrics: dict[str, float] = {}
    if config.rounds is not None:
        from genkit.training.rounds import self_play

        del run
        self_play(config, quiet=quiet)
    else:
        trainer = Trainer(run, quiet=quiet)
        start = trainer.step
        with counting(run.objective) as calls:
            trainer.train()
        items = (trainer.step - start) * config.global_batch_size / trainer.accelerator.num_processes
        metrics |= {f"network calls in training, an item ({role})": n / items for role, n in calls.items()}
        save(trainer, pipeline)
        del trainer, run
    rows = measure_few_steps(pipeline, source, config, quiet=quiet)
    (output / "few_steps.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    code = usage(pipeline, _few_steps(pipeline))
    metrics |= {f"{k} ({row['steps']} steps)": v for row in rows for k, v in row.items() if k != "steps"}
    card = model_card(
        method,
        config.model_dump(mode="json", exclude_unset=True),
        metrics,
        code,
        title=f"{_named(teacher)} in few steps",
        description=f"Distilled from `{teacher}` by {method}, in {config.max_train_steps} training steps.",
        base_model=base_model(teacher),
    )
    (pipeline / "README.md").write_text(str(card), encoding="utf-8")
    _report(console, metrics, rows, code)
    return pipeline


def _named(teacher: str) -> str:
    """What a teacher is called: the last of its path that says more than ``pipeline``."""
    path = Path(teacher)
    return path.parent.name if path.name == "pipeline" and path.parent.name else path.name


def _pipeline_class(teacher: str) -> str:
    """The class that the teacher was saved as.

    Raises:
        ValueError, FileNotFoundError: no pipeline there.
    """
    if not (Path(teacher) / "model_index.json").is_file():
        if Path(teacher).exists() or teacher.count("/") != 1:
            raise FileNotFoundError(
                f"teacher={teacher!r} is neither a pipeline folder nor a name (owner/name) on the Hub"
            )
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(teacher)  # type: ignore[assignment]
    except OSError as error:
        raise FileNotFoundError(f"teacher={teacher!r} was not found on the Hub: {first_line(error)}") from error
    name = index["_class_name"]
    return name if isinstance(name, str) else name[-1]  # a portable folder names the file, too


def save(trainer: Trainer, folder: Path) -> None:
    """Write the student as a pipeline that needs no other file, beside what :func:`export` writes."""
    exported, run = export(trainer), trainer.run
    if exported == folder:
        return
    with trainer.averaged():
        if not isinstance(run.student, TwoTime):
            save_pipeline(run, folder)
            return
        fuse(base_network(run.student))
        pipe = FewStepPipeline.from_pipe(
            run.pipe,
            gap_embedder=run.student.network.gap_embedder,
            scheduler=run.objective.scheduler(run.pipe.components["scheduler"]),
        )
        pipe.save_pretrained(folder)


# -- what is said -----------------------------------------------------------------------------------------------------


def _announce(console: Console, run: Run) -> None:
    """What will be done, and what memory it takes."""
    config = run.config
    table = Table("role", "parameters", "trained", "weights", "gradients", "optimiser", "averages", "sum", box=None)
    rows = footprints(run)
    for row in rows:
        sizes = (row.weights, row.gradients, row.optimizer, row.averages, row.total)
        table.add_row(row.role, _short(row.parameters), _short(row.trained), *(f"{_short(size)}B" for size in sizes))
    console.print(table)
    console.print(
        f"{_short(sum(row.total for row in rows))}B in all, without activations: these grow with the batch, and shrink "
        "by gradient_checkpointing and gradient_accumulation_steps"
    )
    phases = ", ".join(f"{p.repeats} x {p.name} ({' and '.join(p.trains)})" for p in run.objective.phases(0))
    console.print(
        f"{config.max_train_steps} steps of {config.global_batch_size} items of {type(run.source).__name__}; the first "
        f"step's updates: {phases}; adapter: {config.adapter.kind}; output: {config.output_dir}"
    )


def _short(n: float) -> str:
    for prefix in ("", "k", "M"):
        if n < 1000:
            return f"{n:.3g} {prefix}"
        n /= 1000
    return f"{n:,.3g} G"


def _report(console: Console, metrics: dict[str, float], rows: list[dict[str, Any]], code: str) -> None:
    for name, value in metrics.items():
        if name.startswith("network calls in training"):
            console.print(f"{name}: {value:.3g}")
    names = list(dict.fromkeys(k for row in rows for k in row))
    table = Table(*names, box=None)
    for row in rows:
        table.add_row(*(f"{row[k]:.4g}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in names))
    if rows:
        console.print(table)
    console.print(f"\nTo use the student:\n\n{code}\n", markup=False)


def _few_steps(folder: Path) -> int:
    """The steps that the student in ``folder`` was trained for."""
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return len(scheduler.get("trained_times") or [1])


def main(**arguments: Any) -> int:
    """The command; returns its exit status. Errors are one message, not a trace."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("genkit").setLevel(logging.WARNING if arguments["quiet"] else logging.INFO)
    try:
        distill(**arguments)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    except (ValueError, FileNotFoundError, ImportError, DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
