"""Tables on a terminal: within its width, and what all rows have in common said once above them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WORDS = 32  # letters of text in a cell before it folds


def print_rows(
    title: str, columns: Mapping[str, Sequence[Any]], *, keep: Sequence[str] = (), console: Console | None = None
) -> None:
    """Print ``columns``, values by head, below ``title``, floats to 5 significant digits.

    Of several rows a column that is the same in all, unless ``keep`` names it, is told in one line instead. Columns
    that the terminal has no room for follow in further tables, each of which begins with the first column.
    """
    console = console or Console()
    shown = {head: [_cell(value) for value in values] for head, values in columns.items()}
    same = [head for head, cells in shown.items() if head not in keep and len(cells) > 1 and len(set(cells)) == 1]
    console.print(Text(title), highlight=False)
    if told := ", ".join(f"{head} {shown[head][0]}" for head in same if shown[head][0]):
        console.print(Text(f"the same in all rows: {told}"), highlight=False)
    first, *rest = [head for head in shown if head not in same]
    part = [first]
    for head in rest:
        if len(part) > 1 and _width(console, _table(shown, [*part, head])) > console.width:
            console.print(_table(shown, part))
            console.print()
            part = [first]
        part.append(head)
    console.print(_table(shown, part))


def _table(shown: Mapping[str, Sequence[str]], heads: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for head in heads:
        cells = shown[head]
        numeric = all(_NUMBER.fullmatch(cell) for cell in cells if cell)
        widest = min(max(map(len, cells), default=0), _WORDS)
        table.add_column(
            Text(_folded(head, widest)), justify="right" if numeric else "left", overflow="fold", max_width=_WORDS
        )
    for row in zip(*(shown[head] for head in heads), strict=True):
        table.add_row(*map(Text, row))
    return table


_NUMBER = re.compile(r"[-+]?(\d[\d.]*(e[-+]?\d+)?|inf|nan)")


def _width(console: Console, table: Table) -> int:
    return table.__rich_measure__(console, console.options.update(width=100_000)).maximum


def _folded(head: str, width: int) -> str:
    """A head in lines about as wide as its cells, broken behind ``_`` and between words."""
    lines = [""]
    for piece in re.findall(r"[^_ ]*[_ ]|[^_ ]+", head):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > max(width, 8):
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)
