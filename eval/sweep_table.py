"""The table of a sweep: a row a cell, ranked by MMHM where its metrics are there."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.eval.directions import is_shown
from genkit.eval.mmhm import METRICS
from genkit.eval.result import Result, differences
from genkit.eval.runs import COSTS
from genkit.eval.selection import ALIASES, canonical, parse_metrics, rank_rows, told
from genkit.eval.tables import Row, find_column, protocol, row_of, write_csv

# What measures the metrics of the published MMHM.
_MEASURED_BY = {
    "fid": "--extractor inception",
    "inception_score": "--metrics inception_score",
    "clip_score": "--metrics reward:clip_score",
    "pick_score": "--metrics reward:pick_score",
}
# What tells the rows of most sweeps apart.
_SETTINGS = ("scheduler", "guider", "guidance_scale", "steps")


def check_table(mmhm: str | None) -> None:
    """Refuse what cannot be read as the metrics of MMHM."""
    if mmhm is not None:
        parse_metrics(mmhm)


def table(results: Mapping[str, Result], *, mmhm: str | None = None, force: bool = False) -> dict[str, Any]:
    """Rows of results, by what they were made with, or best first and with MMHM's columns (``rank_rows``).

    ``notes`` says why there is no MMHM, where there is none.

    Args:
        mmhm: the metrics that it is made of, as ``genkit eval mmhm`` has them; by default the published four.
        force: rank cells of which some images could not be used, and which therefore differ in n, all the same.
    """
    rows = sorted((row_of(result.model_dump(mode="json")) for result in results.values()), key=_order)
    metrics = METRICS if mmhm is None else parse_metrics(mmhm)
    lacking = [name for name in metrics if find_column(rows, ALIASES.get(name, (name,))) is None]
    if not rows:
        return {"rows": [], "notes": ["no cell has a result"]}
    if lacking:
        return {"rows": rows, "notes": [_advice(lacking, rows, mmhm)]}
    differing = differences([protocol(row) for row in rows])
    if differing and not force:
        told = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in differing.items())
        note = f"no MMHM: cells differ in their protocols ({told}), as some images could not be used; --force ranks"
        return {"rows": rows, "notes": [note]}
    return rank_rows(rows, metrics=metrics, force=force)


def _order(row: Row) -> tuple:
    names, steps = tuple(str(row.get(k) or "") for k in ("model", "scheduler", "guider")), row.get("steps") or 0
    falling = isinstance(steps, str)  # after the numbers
    return *names, float(row.get("guidance_scale") or 0), falling, steps


def _advice(lacking: list[str], rows: list[Row], mmhm: str | None) -> str:
    if mmhm is not None:
        there = ", ".join(k for k, v in rows[0].items() if isinstance(v, float) and k != "guidance_scale")
        return f"no MMHM: no column {', '.join(lacking)}; there are {there}"
    told = ", ".join(f"{name} ({_MEASURED_BY[name]})" for name in lacking)
    return f"no MMHM: it needs {told}; or name others that are here, as --mmhm NAME:min,NAME:max"


def show_table(
    found: dict[str, Any],
    folder: Path,
    written: Mapping[str, Path | None],
    *,
    told: Sequence[str],
    force: bool,
    mmhm: str | None,
    quiet: bool,
) -> None:
    """Write ``results.csv`` beside the cells, copies and the page where asked for, and print unless ``quiet``.

    ``told``: the settings that tell cells apart.
    """
    write_csv(folder / "results.csv", found["rows"])
    if written["csv"] is not None:
        write_csv(written["csv"], found["rows"])
    if written["json"] is not None:
        written["json"].write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if written["html"] is not None:
        from genkit.eval.page import main as write_page

        ranked = "mmhm" in found["rows"][0]
        write_page([folder], written["html"], mmhm=mmhm if ranked else None, force=force, quiet=True)
    if quiet:
        return
    _print(found, folder, told)


def _print(found: Mapping[str, Any], folder: Path, settings: Sequence[str]) -> None:
    from rich.console import Console

    from genkit.eval.terminal import print_rows

    rows = found["rows"]
    ranked = bool(rows) and "mmhm" in rows[0]
    every = dict.fromkeys(name for row in rows for name in row)
    names = {"mmhm_rank": "rank", "mmhm": "MMHM"} if ranked else {}
    names |= {k: k.replace("_", " ") for k in dict.fromkeys((*_SETTINGS, *settings, *COSTS)) if k in every}
    metrics = {k: k for k in every if canonical(k) in found.get("metrics", {})}
    names |= metrics | {k: k for k in every if is_shown(k)}
    console = Console()
    columns = {head: [row.get(name) for row in rows] for name, head in names.items()}
    if rows:
        print_rows(str(folder), columns, keep=["rank", "MMHM", "steps", *metrics], console=console)
    for line in told(found, ranks=True) if ranked else [f"note: {note}" for note in found["notes"]]:
        console.print(line, highlight=False, markup=False)
