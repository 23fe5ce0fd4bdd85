"""What pages that compare results are made of beside text, tables and figures: more blocks for reports."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from genkit.eval.report import Block, Code, data_uri, format_number

# Colours that a drawing is made with, and what the page puts in their place, so that it follows light, dark and print.
INK, GRID = "#0a0b0c", "#0d0e0f"
_SHOWN_SIDE = 128


@dataclass(frozen=True)
class Callout:
    """A sentence that nobody may overlook."""

    title: str
    text: str
    kind: ClassVar[str] = "callout"


@dataclass(frozen=True)
class Card:
    """A finding: what it is about, the winner, and by how much."""

    title: str
    winner: str
    detail: str = ""
    main: bool = False


@dataclass(frozen=True)
class Cards:
    """Findings side by side."""

    items: Sequence[Card]
    kind: ClassVar[str] = "cards"


@dataclass(frozen=True)
class Details:
    """Blocks that open on a click; printed they are open."""

    title: str
    blocks: Sequence[Block]
    kind: ClassVar[str] = "details"


@dataclass(frozen=True)
class Commands:
    """Commands to copy, under what they do."""

    items: Sequence[tuple[str, Code]]
    kind: ClassVar[str] = "commands"


@dataclass(frozen=True)
class Heatmap:
    """A symmetric matrix of values in [-1, 1], coloured, with its numbers."""

    names: Sequence[str]
    matrix: Sequence[Sequence[float]]
    caption: str = ""
    kind: ClassVar[str] = "heatmap"

    @cached_property
    def rows(self) -> list[tuple[str, list[dict[str, str]]]]:
        """For the template: of each cell its text, its sign and the strength of its colour in percent."""

        def cell(v: float) -> dict[str, str]:
            text, sign = f"{v:+.2f}".replace("-", "−"), "neg" if v < 0 else "pos"
            return {"text": text, "sign": sign, "share": f"{abs(v) * 60:.0f}"}

        return [(name, [cell(v) for v in row]) for name, row in zip(self.names, self.matrix, strict=True)]


@dataclass(frozen=True)
class Drawing:
    """A matplotlib figure as SVG within the page, whose lettering follows the page's colours; drawn in INK and GRID.

    ``number`` tells drawings of one page apart: what they define in themselves must not bear the same name.
    """

    figure: Any
    title: str
    number: int
    kind: ClassVar[str] = "drawing"

    @cached_property
    def svg(self) -> str:
        import matplotlib

        buffer = io.StringIO()
        # A fixed salt makes element ids, and so the whole page, a function of the figure alone.
        with matplotlib.rc_context({"svg.hashsalt": "genkit", "svg.fonttype": "none"}):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
        used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
        text = re.sub(r' id="([^"]*)"', lambda m: f' id="d{self.number}-{m[1]}"' if m[1] in used else "", text)
        text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>d{self.number}-", text)
        text = text.replace(INK, "currentColor").replace(GRID, "var(--line)")
        return re.sub(
            r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>',
            r'<svg viewBox="\1" xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true">',
            text,
        )


@dataclass(frozen=True)
class Drawings:
    """Drawings of the same lines side by side, with one legend ``(colour, name)``."""

    items: Sequence[Drawing]
    legend: Sequence[tuple[str, str]]
    caption: str = ""
    kind: ClassVar[str] = "drawings"


@dataclass(frozen=True)
class Strip:
    """Images uint8 ``(n, C, H, W)``, C 1 or 3, in one row under a name, each with a word below if ``captions``."""

    name: str
    images: Tensor
    captions: Sequence[str] = ()

    @cached_property
    def tiles(self) -> list[dict[str, str]]:
        words = self.captions or [""] * len(self.images)
        return [{"src": tile(image), "caption": word} for image, word in zip(self.images, words, strict=True)]

    @property
    def pixelated(self) -> bool:
        return max(self.images.shape[-2:]) <= 48


@dataclass(frozen=True)
class Strips:
    """Rows of images one below the other, so that a column compares one item; ``heads`` name the columns.

    Rows after the first ``folded_after`` open on a click.
    """

    rows: Sequence[Strip]
    heads: Sequence[str] = ()
    title: str = ""
    caption: str = ""
    folded_after: int = 8
    kind: ClassVar[str] = "strips"

    @property
    def parts(self) -> list[Sequence[Strip]]:
        """What is seen at once, and what is folded."""
        cut = self.folded_after
        return [part for part in (self.rows[:cut], self.rows[cut:]) if part]


def tile(image: Tensor) -> str:
    """uint8 ``(C, H, W)`` as an address that holds it: PNG to the pixel, but larger ones shrunk to 128 pixels, WebP."""
    if str(image.dtype) != "torch.uint8" or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"a tile takes uint8 (1 or 3, H, W), got {image.dtype} {tuple(image.shape)}")
    pixels = image.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels[..., 0] if image.shape[0] == 1 else pixels)
    buffer, longest = io.BytesIO(), max(picture.size)
    if longest <= _SHOWN_SIDE:
        picture.save(buffer, format="PNG", optimize=True)
        return data_uri(buffer.getvalue(), "image/png")
    size = [max(1, round(side * _SHOWN_SIDE / longest)) for side in picture.size]
    picture.resize((size[0], size[1]), Image.Resampling.LANCZOS).save(buffer, format="WEBP", quality=88)
    return data_uri(buffer.getvalue(), "image/webp")


def short(value: float, digits: int = 3) -> str:
    """A number for people: infinite ones by their sign."""
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else format_number(value, digits)
