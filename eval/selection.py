"""``genkit eval mmhm``: rank the rows of a results table by MMHM, and say how far the choice can be trusted."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from genkit.eval.directions import better
from genkit.eval.mmhm import METRICS, Direction, comparable, mmhm, pareto_front, ranking, stability
from genkit.eval.result import differences
from genkit.eval.runs import read_table
from genkit.eval.tables import Row, find_column, numbers, plain, protocol, write_csv

ALIASES = {
    "fid": ("fid",),
    "inception_score": ("is_mean", "inception_score", "is"),
    "clip_score": ("clip_score", "clip"),
    "pick_score": ("pick_score", "pickscore"),
}
FEW = 5
_HEADS = {"rank": "mmhm_rank", "row": "mmhm_row", "MMHM": "mmhm"}
_ROWS = re.compile(r"\brows? (\d+(?:, \d+)*)")
DIRECTIONS: dict[str | None, Direction] = {"lower": "min", "higher": "max"}


def rank_rows(
    rows: Sequence[Row],
    *,
    metrics: Mapping[str, Direction] = METRICS,
    bounds: Mapping[str, Mapping[str, float]] | None = None,
    bounds_protocols: Sequence[Mapping[str, Any]] = (),
    weights: Mapping[str, float] | None = None,
    eps: float = 1e-3,
    clip: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Rows from best to worst by ``mmhm``, with settings, bounds, the leave-one-row-out stability and notes, as JSON.

    Columns are found whatever their case, and by the names in ``ALIASES``. To each row come ``mmhm_rank``, ``mmhm``,
    ``mmhm_row`` (its number in the table), ``mmhm_u_NAME`` by metric, ``mmhm_pareto`` (no row beats it),
    ``mmhm_outside`` (of stored bounds) and ``mmhm_forced``; such columns of an earlier call are replaced. Ties go to
    fewer network calls (``nfe``, else ``steps`` times ``calls_per_step``), then to fewer ``head_calls``, then to the
    lower ``guidance_scale`` or ``cfg``, and are noted.

    Args:
        bounds_protocols: those of the rows that ``bounds`` are of, which must agree with the rows' own.
        force: rank rows of different protocols all the same; the result names the settings in which they differ.

    Raises:
        ValueError: as ``mmhm``; cells that are empty or no numbers, by row and column; rows of different protocols.
    """
    own = [{k: v for k, v in row.items() if k != "mmhm" and not k.startswith("mmhm_")} for row in rows]
    columns = _columns(own, metrics)
    protocols = [protocol(row) for row in own]
    differing = differences([*protocols, *bounds_protocols])
    if differing and not force:
        told = "; ".join(f"{name}: {', '.join(map(repr, values))}" for name, values in differing.items())
        raise ValueError(f"rows of different protocols cannot be compared ({told}); --force ranks them all the same")
    got = mmhm(columns, metrics=metrics, bounds=bounds, weights=weights, eps=eps, clip=clip)
    ties = _ties(own)
    order = ranking(got.scores, *ties.values())
    stable = stability(columns, *ties.values(), metrics=metrics, bounds=bounds, weights=weights, eps=eps, clip=clip)
    front = pareto_front(columns, metrics)

    notes = []
    if differing:
        notes.append(f"forced: rows differ in {', '.join(differing)}, and their values may not compare")
    elif not any(protocols):
        notes.append("the rows do not say by which protocol they were measured")
    if bounds is None and len(rows) < FEW:
        notes.append(f"{len(rows)} rows: fewer than {FEW} make scores all but extreme, and the choice with them")
    notes += [f"{k} has one bound for all and decides nothing" for k, b in got.bounds.items() if b["min"] == b["max"]]
    if got.outside.any():
        told = ", ".join(str(i + 1) for i in got.outside.nonzero()[0])
        notes.append(f"outside of the bounds: row {told}" + ("" if clip else ", whose score means little"))
    equal = [i for i in order if comparable(got.scores[i]) == comparable(got.scores[order[0]])]
    if len(equal) > 1:
        told = ", ".join(str(i + 1) for i in equal)
        notes.append(f"a tie of rows {told}, broken by {', then '.join([*ties, 'order in the table'])}")
    notes += [f"without row {i + 1} row {new + 1} wins" for i, new in stable.changes.items()]

    ranked = []
    for rank, i in enumerate(order, start=1):
        u = {f"mmhm_u_{name}": float(value) for name, value in zip(metrics, got.normalised[i], strict=True)}
        found = {"mmhm_rank": rank, "mmhm": float(got.scores[i]), "mmhm_row": i + 1, **own[i], **u}
        flags = {"mmhm_pareto": bool(front[i]), "mmhm_outside": bool(got.outside[i]), "mmhm_forced": bool(differing)}
        ranked.append(found | flags)
    return {
        "metrics": dict(metrics),
        "weights": {name: (weights or {}).get(name, 1.0) for name in metrics},
        "eps": eps,
        "bounds": got.bounds,
        "bounds_given": bounds is not None,
        "clip": clip if bounds is not None else None,
        "forced": differing or None,
        "stability": stable.share,
        "notes": notes,
        "rows": ranked,
    }


def _columns(rows: Sequence[Row], metrics: Mapping[str, Direction]) -> dict[str, list[float]]:
    where = {name: find_column(rows, ALIASES.get(name, (name,))) for name in metrics}
    missing = [" or ".join(ALIASES.get(name, (name,))) for name, column in where.items() if column is None]
    if missing:
        there = ", ".join(dict.fromkeys(name for row in rows for name in row))
        raise ValueError(f"missing columns: {'; '.join(missing)}. There are: {there}")
    return {name: numbers(rows, column) for name, column in where.items() if column is not None}


def _ties(rows: Sequence[Row]) -> dict[str, list[float]]:
    """What breaks ties, by name and in turn; rows that do not say come last."""
    ties = {}

    def column(*names: str, empty: float = float("inf")) -> list[float] | None:
        found = find_column(rows, names)
        return None if found is None else numbers(rows, found, empty=empty)

    if (calls := column("nfe", "network_calls")) is not None:
        ties["fewer network calls"] = calls
    elif (steps := column("steps", "num_inference_steps")) is not None:
        each = column("calls_per_step", empty=1.0) or [1.0] * len(rows)
        ties["fewer network calls"] = [n * k for n, k in zip(steps, each, strict=True)]
    if (of_head := column("head_calls")) is not None:
        ties["fewer calls of the diffusion head"] = of_head
    if (guidance := column("guidance_scale", "cfg", "guidance")) is not None:
        ties["lower guidance"] = guidance
    return ties


def parse_metrics(text: str) -> dict[str, Direction]:
    """``fid,lpips,sharpness:max``: names, and which way is better where no metric of ours declares it.

    Raises:
        ValueError: a name without a direction, one named twice, another direction.
    """
    found: dict[str, Direction] = {}
    for part in text.split(","):
        name, _, direction = (piece.strip() for piece in part.partition(":"))
        name = canonical(name)
        direction = direction or DIRECTIONS.get(better(name), "")
        if not name or direction not in ("min", "max"):
            raise ValueError(
                f"metrics: {part.strip()!r}; expected NAME:min or NAME:max, or a name whose better way is known, such "
                f"as {', '.join(METRICS)}"
            )
        if name in found:
            raise ValueError(f"metrics: {name!r} is named twice")
        found[name] = cast(Direction, direction)
    return found


def parse_weights(text: str) -> dict[str, float]:
    """``fid=2,clip_score=0.5``.

    Raises:
        ValueError: other text, or a name twice.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = canonical(name)
        try:
            weight = float(value)
        except ValueError:
            raise ValueError(f"weights: {part.strip()!r}; expected NAME=NUMBER") from None
        if name in found:
            raise ValueError(f"weights: {name!r} is named twice")
        found[name] = weight
    return found


def canonical(name: str) -> str:
    """A metric's name as ours have it, whatever a table calls it: ``is_mean`` is ``inception_score``."""
    name = plain(name)
    return next((known for known, names in ALIASES.items() if name in names), name)


def read_bounds(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Bounds of a file ``{metric: {"min": lo, "max": hi}}`` or of an earlier result, and its rows' protocols.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such JSON.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    rows = found.get("rows", []) if isinstance(found, dict) else []
    bounds = found.get("bounds", found) if isinstance(found, dict) else None
    if not isinstance(bounds, dict):
        raise ValueError(f'{path}: expected {{"METRIC": {{"min": number, "max": number}}}} or a result with "bounds"')
    return {canonical(name): bound for name, bound in bounds.items()}, [protocol(row) for row in rows]


def main(
    table: str | Path,
    *,
    metrics: str | None = None,
    weights: str | None = None,
    eps: float = 1e-3,
    bounds: str | Path | None = None,
    clip: bool = True,
    force: bool = False,
    json_path: str | Path | None = None,
    csv_path: str | Path | None = None,
    html_path: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Rank the rows of ``table``, a file or a sweep's folder, print unless ``quiet``, write the files asked for; see
    ``rank_rows``."""
    for path in (json_path, csv_path, html_path):
        if path is None:
            continue
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: the folder {Path(path).absolute().parent} does not exist")
        if Path(path).resolve() in {Path(read).resolve() for read in (table, bounds) if read is not None}:
            raise ValueError(f"{path}: the result would overwrite what it is made from")
    stored, protocols = (None, []) if bounds is None else read_bounds(bounds)
    chosen = METRICS if metrics is None else parse_metrics(metrics)
    weighted = None if weights is None else parse_weights(weights)
    rows, notes = read_table(table)
    try:
        result = rank_rows(
            rows,
            metrics=chosen,
            bounds=stored,
            bounds_protocols=protocols,
            weights=weighted,
            eps=eps,
            clip=clip,
            force=force,
        )
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from error
    result["notes"] += notes
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if csv_path is not None:
        write_csv(csv_path, result["rows"])
    if html_path is not None:
        _write_html(html_path, result, Path(table).name)
    if not quiet:
        _print(result, Path(table).name)
    return result


def told(result: Mapping[str, Any], *, ranks: bool = False) -> list[str]:
    """What a ranking says of itself, in lines: bounds, stability and notes.

    Rows are called by their number in the table that was ranked, or, where nobody has seen it, by their ``ranks``.
    """
    called = {
        row["mmhm_row"]: f"rank {row['mmhm_rank']}" if ranks else f"row {row['mmhm_row']}" for row in result["rows"]
    }
    bounds = ", ".join(f"{name} {b['min']:.5g} to {b['max']:.5g}" for name, b in result["bounds"].items())
    share = result["stability"]
    told = [f"bounds{' given' if result['bounds_given'] else ' of these rows'}: {bounds}; eps {result['eps']:g}"]
    if share is not None:
        first = called[result["rows"][0]["mmhm_row"]]
        told.append(f"stability: {first} wins in {share:.0%} of tables less another row")
    return told + [f"note: {note}" for note in call_rows(result["notes"], called)]


def call_rows(notes: Sequence[str], called: Mapping[int, str]) -> list[str]:
    """Notes of a ranking with its rows, numbered as in the table that was ranked, by other names."""
    return [_ROWS.sub(lambda m: ", ".join(called[int(i)] for i in m[1].split(", ")), note) for note in notes]


def _shown(result: Mapping[str, Any]) -> list[str]:
    """The table's own columns; the protocol, too long for one, is in the files."""
    names = dict.fromkeys(name for row in result["rows"] for name in row)
    return [k for k in names if k not in ("mmhm", "protocol") and not k.startswith(("mmhm_", "protocol."))]


def _print(result: Mapping[str, Any], title: str) -> None:
    from rich.console import Console

    from genkit.eval.terminal import print_rows

    rows = result["rows"]
    columns = {head: [row[name] for row in rows] for head, name in _HEADS.items()}
    shown = _shown(result)
    columns |= {name: [_number(row.get(name)) for row in rows] for name in shown}
    columns["front"] = ["yes" if row["mmhm_pareto"] else "" for row in rows]
    console = Console()
    print_rows(
        f"MMHM of {title}",
        columns,
        keep=[*_HEADS, "front", *(k for k in shown if canonical(k) in result["metrics"])],
        console=console,
    )
    for line in told(result):
        console.print(line, highlight=False, markup=False)


def _write_html(path: str | Path, result: Mapping[str, Any], title: str) -> None:
    from genkit.eval.report import Block, Column, ProtocolBlock, Section, Table, write_report

    every = _shown(result)
    shown = [
        k for k in every if canonical(k) in result["metrics"] or len({str(row.get(k)) for row in result["rows"]}) > 1
    ]
    heads: list[str | Column] = ["rank", "row", Column("MMHM", "higher", 5), *shown]
    heads += [Column(f"u of {name}", "higher") for name in result["metrics"]] + ["on the Pareto front"]
    rows = [
        [row["mmhm_rank"], row["mmhm_row"], row["mmhm"], *(_number(row.get(name)) for name in shown)]
        + [row[f"mmhm_u_{name}"] for name in result["metrics"]]
        + ["yes" if row["mmhm_pareto"] else "no"]
        for row in result["rows"]
    ]
    blocks: list[Block | str] = [Table(heads, rows), *told(result)]
    settings = {name: result[name] for name in ("metrics", "weights", "eps", "bounds", "clip", "forced")}
    same = {name: _number(result["rows"][0].get(name)) for name in every if name not in shown}
    made = {k: v for k, v in (settings | same | protocol(result["rows"][0])).items() if v is not None}
    write_report(path, f"MMHM of {title}", Section("Ranking", blocks), Section("Protocol", [ProtocolBlock(made)]))


def _number(cell: Any) -> Any:
    """A CSV cell as what it says, so that the report sorts it as a number."""
    try:
        value = float(cell) if isinstance(cell, str) else math.nan
    except ValueError:
        return cell
    return cell if not math.isfinite(value) else int(value) if value.is_integer() else value
