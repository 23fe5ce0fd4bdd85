"""A self-contained HTML report: text, sortable tables, image grids and figures in one file that opens from disk."""

import base64
import io
import math
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from torch import Tensor

import genkit
from genkit.eval.result import Protocol

TEMPLATES = Path(__file__).parent / "templates"


class Block(typing.Protocol):
    """Anything that the templates can draw; ``kind`` says how."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Column:
    """A table's column. ``better`` marks its best number; ``digits`` are significant ones."""

    name: str
    better: Literal["lower", "higher"] | None = None
    digits: int = 3


@dataclass(frozen=True)
class Cell:
    """A table's cell with a small remark below its value."""

    value: Any
    note: str


@dataclass(frozen=True)
class Table:
    """Rows of numbers and text, alone or as ``Cell``; a click on a head sorts. ``None`` shows as a dash.

    Rows numbered in ``aside`` (such as real data) take no part in the choice of the best.

    Raises:
        ValueError: a row whose length is not the number of columns.
    """

    columns: Sequence[str | Column]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    aside: Sequence[int] = ()
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"table row {i} has {len(row)} cells for {len(self.columns)} columns")

    @cached_property
    def heads(self) -> list[Column]:
        return [column if isinstance(column, Column) else Column(column) for column in self.columns]

    @cached_property
    def cells(self) -> list[list[dict]]:
        """For the template: of each cell its text, its number if it is one, and whether it is the column's best."""
        best = []
        values = [[cell.value if isinstance(cell, Cell) else cell for cell in row] for row in self.rows]
        for j, column in enumerate(self.heads):
            numbers = [row[j] for i, row in enumerate(values) if i not in self.aside and _is_number(row[j])]
            pick = {"lower": min, "higher": max}.get(column.better or "")
            best.append(pick(numbers) if pick and len(numbers) > 1 else None)
        return [
            [
                {
                    "text": format_number(value, column.digits)
                    if _is_number(value)
                    else ("–" if value is None else value),
                    "number": value if _is_number(value) else None,
                    "best": best[j] is not None and i not in self.aside and value == best[j],
                    "note": cell.note if isinstance(cell, Cell) else "",
                }
                for j, (value, cell, column) in enumerate(zip(values[i], row, self.heads, strict=True))
            ]
            for i, row in enumerate(self.rows)
        ]


@dataclass(frozen=True)
class ImageGrid:
    """uint8 images ``(n, C, H, W)``, C 1 or 3, in rows of ``columns``, enlarged by the whole factor ``scale``.

    Small images keep hard pixel edges (nearest neighbour). ``scale`` None makes an image about 40 pixels.
    """

    images: Tensor
    caption: str = ""
    columns: int = 10
    scale: int | None = None
    kind: ClassVar[str] = "grid"

    @cached_property
    def src(self) -> str:
        return data_uri(grid_png(self.images, self.columns, self.scale), "image/png")


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure, inlined as SVG; ``raster=True`` as PNG, for plots of very many points."""

    figure: Any
    caption: str = ""
    raster: bool = False
    kind: ClassVar[str] = "figure"

    @cached_property
    def src(self) -> str:
        import matplotlib

        buffer = io.BytesIO()
        kind, mime = ("png", "image/png") if self.raster else ("svg", "image/svg+xml")
        # A fixed salt makes element ids, and so the whole file, a function of the figure alone.
        with matplotlib.rc_context({"svg.hashsalt": "genkit", "svg.fonttype": "path"}):
            metadata = {} if self.raster else {"Date": None}
            self.figure.savefig(buffer, format=kind, dpi=144, bbox_inches="tight", metadata=metadata)
        return data_uri(buffer.getvalue(), mime)


@dataclass(frozen=True)
class Gallery:
    """Grids or figures side by side, as many in a row as the screen has room for."""

    items: Sequence[ImageGrid | Figure]
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Code:
    """Text to copy, in a fixed-width font."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class ProtocolBlock:
    """How the figures were made: a result's protocol, or any names and values."""

    protocol: Protocol | dict[str, Any]
    kind: ClassVar[str] = "protocol"

    @cached_property
    def items(self) -> list[tuple[str, str]]:
        given = self.protocol
        fields = given.model_dump(exclude_none=True) if isinstance(given, Protocol) else given
        return [(name.replace("_", " "), _in_words(value)) for name, value in fields.items()]


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; a ``str`` among the blocks is a paragraph."""

    title: str
    blocks: Sequence[Block | str]

    @cached_property
    def content(self) -> list[Block]:
        return [Paragraph(block) if isinstance(block, str) else block for block in self.blocks]


def write_report(path: str | Path, title: str, *sections: Section, subtitle: str = "") -> Path:
    """Write ``sections`` as one HTML file without outside references, and return its path.

    All text is escaped. The same sections give the same bytes: nothing says when it was written. The file is put in
    place in one move, so that a crash leaves the previous report whole.
    """
    if not sections:
        raise ValueError("write_report: at least one section is needed")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["breaks"] = _breakable
    html = environment.get_template("report.html.jinja").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        version=genkit.__version__,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)
    return path


def grid_png(images: Tensor, columns: int, scale: int | None = None) -> bytes:
    """PNG of uint8 ``(n, C, H, W)`` in rows of ``columns``, with transparent gaps between the images."""
    if str(images.dtype) != "torch.uint8" or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"an image grid takes uint8 (n, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"columns={columns}, scale={scale}: expected at least 1")
    n, _, height, width = images.shape
    scale = scale or max(1, round(40 / max(height, width)))
    pixels = images.detach().cpu().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width, gap = height * scale, width * scale, 4
    rows, columns = math.ceil(n / columns), min(columns, n)
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), dtype=np.uint8)
    for i, image in enumerate(pixels):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + height, x : x + width, :3] = image
        sheet[y : y + height, x : x + width, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(content: bytes, mime: str) -> str:
    """``content`` as an address that holds it, so that the page needs no other file."""
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def format_number(value: float, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent where that stays readable; whole numbers as they are."""
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if not math.isfinite(value) or not size:
        return f"{value:g}"
    if size < 1e-4 or size >= 1e7:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"


def _breakable(name: Any) -> Markup:
    """A name that may continue on the next line after ``_``."""
    return Markup("_<wbr>").join(str(name).split("_"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(of)}".strip() for key, of in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value))
    return str(value)
