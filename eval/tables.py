"""Tables of results: rows of CSV or JSON files, their columns by name, and whether their protocols agree."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a CSV file with a head, of a JSON list of objects or object with such a list as ``rows``, or a result.

    A result of ``genkit eval run --json``, alone or in a list, is a row of its values, calls and ``protocol``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, text that does not parse, no rows, a row longer or shorter than the head, a column
            named twice.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"{path}: expected a .csv or .json file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before the first name
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error
    rows = _csv(path, text) if path.suffix.lower() == ".csv" else _json(path, text)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def _csv(path: Path, text: str) -> list[Row]:
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline="")) if line]
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV: {error}") from error
    head = [name.strip() for name in lines[0]] if lines else []
    for name in head:
        if head.count(name) > 1:
            raise ValueError(f"{path}: {head.count(name)} columns are named {name!r}")
    for i, line in enumerate(lines[1:], start=1):
        if len(line) != len(head):
            raise ValueError(f"{path}: row {i} has {len(line)} cells, the head has {len(head)}")
    return [dict(zip(head, line, strict=True)) for line in lines[1:]]


def _json(path: Path, text: str) -> list[Row]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if isinstance(found, dict):
        found = found["rows"] if "rows" in found else [found]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: expected a list of rows, each an object of values by column")
    return [row_of(row) if isinstance(row.get("values"), dict) else row for row in found]


def row_of(row: Row) -> Row:
    """A result, as JSON has it, as a table's row: what it was made with, its values, ``nfe``, ``protocol``, and
    ``head_calls`` where there are any."""
    protocol = row.get("protocol")
    name = protocol.get("generated") if isinstance(protocol, dict) else None
    made = row.get("made_with") or {}
    calls = {"nfe": row.get("nfe")}
    if row.get("head_calls") is not None:
        calls["head_calls"] = row["head_calls"]
    return {"generated": name, **made, **row["values"], **calls, "protocol": protocol}


def plain(name: str) -> str:
    """A column's name in the writing in which names are compared: ``CLIP Score`` is ``clip_score``."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def find_column(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """The column that bears one of ``names``, as ``plain`` compares them; ``None`` if there is none.

    Raises:
        ValueError: several do.
    """
    columns, wanted = dict.fromkeys(name for row in rows for name in row), set(map(plain, names))
    found = [column for column in columns if plain(column) in wanted]
    if len(found) > 1:
        raise ValueError(f"columns {' and '.join(map(repr, found))} name the same thing; rename or remove one")
    return found[0] if found else None


def numbers(rows: Sequence[Row], column: str, *, empty: float | None = None) -> list[float]:
    """A column as numbers; ``empty`` is what a cell without content counts as, where that is accepted.

    Raises:
        ValueError: a cell is empty, no number or not finite; row (counted from 1) and column are named.
    """
    values = []
    for i, row in enumerate(rows, start=1):
        cell = row.get(column)
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            if empty is None:
                raise ValueError(f"row {i}, column {column!r}: empty")
            values.append(empty)
            continue
        try:
            value = math.nan if isinstance(cell, bool) else float(cell)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"row {i}, column {column!r}: {cell!r} is not a finite number")
        values.append(value)
    return values


def protocol(row: Row) -> dict[str, Any]:
    """How a row was made: its column ``protocol``, a tag or JSON, and those called ``protocol.NAME``; maybe nothing."""
    found: dict[str, Any] = {}
    for column, cell in row.items():
        if cell is None or cell == "":
            continue
        if column == "protocol":
            cell = _parsed(cell)
            found |= cell if isinstance(cell, dict) else {"protocol": cell}
        elif column.startswith("protocol."):
            found[column.removeprefix("protocol.")] = _parsed(cell)
    return found


def _parsed(cell: Any) -> Any:
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except json.JSONDecodeError:
        return cell


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows with a head of every column; objects and lists as JSON, numbers to their last digit."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, (dict, list, bool)) else v for k, v in row.items()})
