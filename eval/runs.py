"""Evaluations to be shown together: from folders, sweeps and result files, with names that tell them apart."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from genkit.eval.result import Result
from genkit.eval.saved import RESULT, Evaluation, load_evaluation
from genkit.eval.tables import Row, read_rows, row_of

CELLS = "cells"
NO_GUIDER = (None, "none")
# What a run cost: shown like its settings, but no name tells it, and no line of a plot is joined by it.
COSTS = ("nfe", "head_calls")
# Settings that name a run where they differ, and how; others do by their own name.
_NAMED = {
    "model": "{}", "guider": "{}", "scheduler": "{}", "steps": "{} steps", "guidance_scale": "guidance {}"
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One evaluation, the ``name`` that it has among the others, and what it was made with as columns of a table."""

    name: str
    evaluation: Evaluation
    settings: dict[str, Any]

    @property
    def result(self) -> Result:
        return self.evaluation.result

    @property
    def row(self) -> Row:
        return row_of(self.result.model_dump(mode="json"))


def read_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The runs of ``paths``, and notes on what is not among them.

    A path is the folder of an evaluation, that of a sweep, whose cells are such folders below ``cells``, or the JSON
    file of a result. What they were made with becomes the settings that tell them apart.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no path, one that is none of these or does not parse, or the same evaluation twice.
    """
    if not paths:
        raise ValueError("no runs; accepted are folders of evaluations or sweeps, and JSON files of results")
    found: list[Evaluation] = []
    notes: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if path.is_file():
            found.append(Evaluation(path, _load(path)))
        elif (path / RESULT).is_file():
            found.append(_load_folder(path))
        elif (path / CELLS).is_dir():
            folders = sorted((p for p in (path / CELLS).iterdir() if p.is_dir()), key=_natural)
            whole = [folder for folder in folders if (folder / RESULT).is_file()]
            if not whole:
                raise ValueError(f"{path}: a sweep of which no cell is finished")
            if len(whole) < len(folders):
                notes.append(f"{len(folders) - len(whole)} of {len(folders)} cells of {path} are not finished")
            found += [_load_folder(folder) for folder in whole]
        else:
            raise ValueError(
                f"{path}: accepted are the folder of an evaluation ({RESULT}), that of a sweep ({CELLS}/), or the JSON "
                "file of a result"
            )
    seen: set[Path] = set()
    for evaluation in found:
        where = evaluation.folder.resolve()
        where = where / RESULT if where.is_dir() else where
        if where in seen:
            raise ValueError(f"{evaluation.folder}: named twice")
        seen.add(where)
    return _named(found), notes


def read_table(path: str | Path) -> tuple[list[Row], list[str]]:
    """Rows of a table (:func:`genkit.eval.tables.read_rows`), or of the runs of a folder, and the notes on these."""
    if not Path(path).is_dir():
        return read_rows(path), []
    runs, notes = read_runs([path])
    return [run.row for run in runs], notes


def _load(path: Path) -> Result:
    try:
        return Result.load(path)
    except (ValidationError, UnicodeDecodeError) as error:
        why = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise ValueError(f"{path}: not a result of an evaluation ({why})") from error


def _load_folder(folder: Path) -> Evaluation:
    _load(folder / RESULT)
    return load_evaluation(folder)


def _natural(path: Path) -> list[Any]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _named(found: Sequence[Evaluation]) -> list[Run]:
    settings = [{k: _plain(v) for k, v in _made(e.result).items()} for e in found]
    models = {str(one["model"]) for one in settings if "model" in one}
    if len({_last(model) for model in models}) == len(
        models
    ):  # folders by their last name, where that tells them apart
        settings = [one | {"model": _last(str(one["model"]))} if "model" in one else one for one in settings]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    varying = telling(settings)
    names = [_name(one, varying, evaluation) for one, evaluation in zip(settings, found, strict=True)]
    for more in (lambda e: e.result.protocol.generated, lambda e: e.folder.name):
        doubled = {name for name in names if names.count(name) > 1}
        names = [
            f"{name} ({more(e)})" if name in doubled and more(e) not in name else name
            for name, e in zip(names, found, strict=True)
        ]
    names = [f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return [Run(n, e, {k: s.get(k) for k in keys}) for n, e, s in zip(names, found, settings, strict=True)]


def telling(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that tell runs apart: those of which several values are known, and a guider that some are without.

    A run of which nothing is known, as of a folder of images, makes none of them differ.
    """

    def values(key: str) -> list[Any]:
        known = [one for one in settings if one.get(key) is not None or (key == "guider" and any(one.values()))]
        found = [one.get(key) for one in known]
        return [value for i, value in enumerate(found) if value not in found[:i]]  # some may be lists

    return [key for key in dict.fromkeys(key for one in settings for key in one) if len(values(key)) > 1]


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _made(result: Result) -> dict[str, Any]:
    made = dict(result.made_with)
    for cost in COSTS:
        if (value := getattr(result, cost)) is not None:
            made.setdefault(cost, value)
    return made


def _plain(value: Any) -> Any:
    """A setting as a table's cell; whole numbers as such, so that 4 and 4.0 are one setting."""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, sort_keys=True)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _name(settings: dict[str, Any], varying: Sequence[str], evaluation: Evaluation) -> str:
    parts = []
    for key in (*_NAMED, *(key for key in varying if key not in _NAMED and key not in COSTS)):
        value = settings.get(key)
        if key in varying and value is not None and not (key == "guider" and value in NO_GUIDER):
            words = _NAMED.get(key, key + " {}").format(value)
            parts.append("1 step" if words == "1 steps" else words)
    return ", ".join(parts) or str(settings.get("model") or evaluation.result.protocol.generated)
