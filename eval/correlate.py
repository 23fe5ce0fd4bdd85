"""``genkit eval correlate``: how far metrics agree over the rows of results, as a correlation matrix."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from genkit.eval.directions import better, is_shown
from genkit.eval.mmhm import METRICS, Direction
from genkit.eval.result import differences
from genkit.eval.runs import read_table
from genkit.eval.selection import ALIASES, canonical, parse_metrics, rank_rows
from genkit.eval.tables import Row, find_column, numbers, protocol

Method = Literal["pearson", "spearman"]
FEW = 3
MANY = 10


def correlations(columns: Mapping[str, Sequence[float]], method: Method = "pearson") -> NDArray[np.float64]:
    """``r_ab = sum (a - mean a)(b - mean b) / sqrt(sum (a - mean a)^2 sum (b - mean b)^2)`` of every two columns.

    ``spearman`` is that of ranks, ties sharing their mean rank. Returns ``(K, K)``, symmetric, 1 on the diagonal.

    Raises:
        ValueError: another method, fewer than two columns or three rows, unequal lengths, a value that is not finite,
            a column whose values are all the same: it correlates with nothing.
    """
    if method not in ("pearson", "spearman"):
        raise ValueError(f"method={method!r}; accepted are 'pearson' and 'spearman'")
    if len(columns) < 2:
        raise ValueError(f"a correlation needs two metrics; there is {', '.join(columns) or 'none'}")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < FEW:
        raise ValueError(f"columns of {lengths} rows: expected as many of each, at least {FEW}")
    z = np.array([list(values) for values in columns.values()], dtype=np.float64)
    for name, values in zip(columns, z, strict=True):
        if not np.isfinite(values).all():
            raise ValueError(f"column {name!r}: row {int(np.argmin(np.isfinite(values))) + 1} is not a finite number")
        if is_constant(values):
            raise ValueError(f"column {name!r} has one value in all rows and correlates with nothing")
    if method == "spearman":
        from scipy.stats import rankdata

        z = rankdata(z, axis=1)
    z = z / np.abs(z).max(axis=1, keepdims=True)
    z = z - z.mean(axis=1, keepdims=True)
    z = z / np.sqrt((z * z).sum(axis=1, keepdims=True))
    r = np.clip(z @ z.T, -1, 1)
    np.fill_diagonal(r, 1)
    return (r + r.T) / 2


def is_constant(values: Sequence[float] | NDArray[np.float64]) -> bool:
    """Whether values differ by no more than rounding."""
    z = np.asarray(values, dtype=np.float64)
    return bool(np.ptp(z) <= 1e-12 * np.abs(z).max())


def correlate(
    rows: Sequence[Row],
    *,
    metrics: Sequence[str] | None = None,
    mmhm: Mapping[str, Direction] = METRICS,
    method: Method = "pearson",
    force: bool = False,
) -> dict[str, Any]:
    """``metrics``, their ``matrix`` over the rows, how it was made, and notes, as JSON has it.

    Args:
        metrics: names, ``mmhm`` among them. By default the published four and MMHM, then every other column that a
            metric of ours declares to be better one way; of these, columns with empty cells or with one value in all
            rows are left out, and notes say so.
        mmhm: what MMHM is made of; it is computed over these rows where their columns are there.
        force: correlate rows of different protocols all the same; the result says so.

    Raises:
        ValueError: fewer than three rows, fewer than two metrics, rows of different protocols; of metrics that were
            named: one that is not there, cells that are no numbers, one value in all rows.
    """
    if len(rows) < FEW:
        raise ValueError(f"{len(rows)} rows: a correlation needs at least {FEW}")
    differing = differences([protocol(row) for row in rows])
    if differing and not force:
        told = "; ".join(f"{name}: {', '.join(map(repr, values))}" for name, values in differing.items())
        raise ValueError(f"rows of different protocols cannot be compared ({told}); --force correlates them")
    notes = [f"forced: rows differ in {', '.join(differing)}, and their values may not compare"] if differing else []
    columns: dict[str, list[float]] = {}
    for name in dict.fromkeys(_known(rows, mmhm) if metrics is None else map(canonical, metrics)):
        try:
            values = _scores(rows, mmhm) if name == "mmhm" else numbers(rows, _column(rows, name))
        except ValueError as error:
            if metrics is not None:
                raise
            notes.append(f"{name} is left out: {error}")
            continue
        if metrics is None and is_constant(values):
            notes.append(f"{name} is left out: it has one value in all rows")
            continue
        columns[name] = values
    if metrics is None and (lacking := [name for name in mmhm if name not in map(canonical, _heads(rows))]):
        notes.append(f"mmhm is left out: there is no column {', '.join(lacking)}")
    matrix = correlations(columns, method)
    ways = {name: "higher" if name == "mmhm" else better(name) for name in columns}
    if "lower" in ways.values() and "higher" in ways.values():
        notes.append("of a metric where lower and one where higher is better, agreement is a negative value")
    if len(rows) < MANY:
        notes.append(
            f"{len(rows)} rows are few: of two metrics that have nothing in common, one time in 20 they give more than "
            f"{_by_chance(len(rows)):.2f}"
        )
    return {
        "method": method,
        "rows": len(rows),
        "metrics": list(columns),
        "better": ways,
        "matrix": matrix.tolist(),
        "mmhm": dict(mmhm) if "mmhm" in columns else None,
        "forced": differing or None,
        "notes": notes,
    }


def _by_chance(n: int) -> float:
    """What ``|r|`` of n independent normal pairs exceeds with probability 0.05: ``r = t / sqrt(n - 2 + t^2)``."""
    from scipy.stats import t

    quantile = float(t.ppf(0.975, n - 2))
    return quantile / math.sqrt(n - 2 + quantile**2)


def _known(rows: Sequence[Row], mmhm: Mapping[str, Direction]) -> list[str]:
    there = list(dict.fromkeys(map(canonical, _heads(rows))))
    four = [name for name in mmhm if name in there]
    rest = [name for name in there if name not in mmhm and is_shown(name) and better(name) is not None]
    return four + (["mmhm"] if len(four) == len(mmhm) else []) + rest


def _heads(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _column(rows: Sequence[Row], name: str) -> str:
    column = find_column(rows, ALIASES.get(name, (name,)))
    if column is None:
        there = ", ".join(_heads(rows))
        raise ValueError(f"metrics: no column {name!r}. There are: {there}")
    return column


def _scores(rows: Sequence[Row], mmhm: Mapping[str, Direction]) -> list[float]:
    ranked = rank_rows(rows, metrics=mmhm, force=True)["rows"]  # their protocols have been looked at
    return [row["mmhm"] for row in sorted(ranked, key=lambda row: row["mmhm_row"])]


def main(
    tables: Sequence[str | Path],
    *,
    metrics: str | None = None,
    mmhm: str | None = None,
    method: str = "pearson",
    force: bool = False,
    json_path: str | Path | None = None,
    csv_path: str | Path | None = None,
    html_path: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Correlate the rows of tables, evaluations and sweeps, print the matrix unless ``quiet``, and write the files
    asked for; see ``correlate``."""
    for path in (json_path, csv_path, html_path):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: the folder {Path(path).absolute().parent} does not exist")
        if path is not None and Path(path).resolve() in {Path(table).resolve() for table in tables}:
            raise ValueError(f"{path}: the result would overwrite what it is made from")
    if not tables:
        raise ValueError("no tables; accepted are CSV and JSON tables, folders of evaluations or sweeps")
    rows: list[Row] = []
    notes: list[str] = []
    for table in tables:
        more_rows, more_notes = read_table(table)
        rows += more_rows
        notes += more_notes
    result = correlate(
        rows,
        metrics=None if metrics is None else metrics.split(","),
        mmhm=METRICS if mmhm is None else parse_metrics(mmhm),
        method=method,  # type: ignore[arg-type]  # checked there
        force=force,
    )
    result["notes"] += notes
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if csv_path is not None:
        with Path(csv_path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([result["method"], *result["metrics"]])
            writer.writerows([name, *row] for name, row in zip(result["metrics"], result["matrix"], strict=True))
    if html_path is not None:
        _write_html(html_path, result)
    if not quiet:
        _print(result)
    return result


def caption(result: Mapping[str, Any]) -> str:
    """What the matrix is, in a sentence."""
    name = {"pearson": "Pearson correlation", "spearman": "Spearman's rank correlation"}[result["method"]]
    return f"{name} over {result['rows']} rows."


def head(name: str, way: str | None) -> str:
    """A metric's name with the arrow of its better way."""
    return name + {"lower": " ↓", "higher": " ↑", None: ""}[way]


def _write_html(path: str | Path, result: Mapping[str, Any]) -> None:
    from genkit.eval.blocks import Callout, Heatmap
    from genkit.eval.report import Block, Section, write_report

    names = [head(name, result["better"][name]) for name in result["metrics"]]
    blocks: list[Block | str] = [Heatmap(names, result["matrix"], caption(result)), *result["notes"]]
    if result["forced"]:
        blocks.insert(0, Callout("Forced:", f"the rows differ in {', '.join(result['forced'])}."))
    write_report(path, "How metrics agree", Section("Correlations", blocks))


def _print(result: Mapping[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=caption(result).rstrip("."), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in result["metrics"]:
        table.add_column(Text(head(name, result["better"][name])), justify="right", overflow="fold")
    for name, row in zip(result["metrics"], result["matrix"], strict=True):
        table.add_row(Text(name), *(f"{value:+.3f}" for value in row))
    console = Console()
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
