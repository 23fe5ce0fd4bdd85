"""Metrics against the settings that were swept: a panel a metric, a line a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genkit.eval.blocks import GRID, INK, Drawing, Drawings
from genkit.eval.correlate import head
from genkit.eval.metrics.base import Better

# Told apart also by people who see fewer colours, on white as on black.
COLOURS = ("#3b7dd8", "#e0861e", "#26a06f", "#d6495b", "#8b5cd6", "#1aa3b5", "#a8703a", "#d85fa8")
MARKERS = "osD^vPX*"
_WIDE = 20  # distances that span more than this factor are drawn on a logarithmic axis


@dataclass(frozen=True)
class Panel:
    """A metric: its values by row, None where a row has none, and its better way."""

    title: str
    values: Sequence[float | None]
    better: Better | None
    intervals: Sequence[tuple[float, float] | None] = ()


def against(
    setting: str, x: Sequence[Any], series: Sequence[str], panels: Sequence[Panel], caption: str, first: int
) -> Drawings | None:
    """Each panel against ``setting``, whose value of row i is ``x[i]``; None where it has fewer than two values.

    Rows of one ``series`` are joined by a line. Where several rows have the same x, which differ in other settings,
    all are dots, and the line passes through the best; of a metric without a better way through none. ``first`` is
    the number of the first drawing on its page.
    """
    rows = [i for i, value in enumerate(x) if _is_number(value)]
    if len({x[i] for i in rows}) < 2:
        return None
    names = list(dict.fromkeys(series[i] for i in rows))
    drawn = [
        Drawing(_panel(setting, x, series, panel, rows, names), head(panel.title, panel.better), first + k)
        for k, panel in enumerate(panels)
        if sum(_is_number(panel.values[i]) for i in rows) > 1
    ]
    legend = [(COLOURS[k % len(COLOURS)], name) for k, name in enumerate(names)]
    return Drawings(drawn, legend, caption) if drawn else None


def usage(counts: Mapping[str, Sequence[int]], caption: str, first: int) -> Drawings:
    """How often codes occur, over the mean, from the commonest to the rarest; those that never occur have no line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 2.9))
    axes = figure.add_axes((0.09, 0.18, 0.89, 0.78))
    for k, of in enumerate(counts.values()):
        ordered = sorted(of, reverse=True)
        mean = sum(ordered) / len(ordered)
        used = [c / mean for c in ordered if c]
        share = [(i + 1) / len(ordered) for i in range(len(used))]
        axes.plot(share, used, "-" if k < len(COLOURS) else "--", color=COLOURS[k % len(COLOURS)], lw=1.8)
    axes.axhline(1, color=GRID, lw=1)
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the codes", color=INK, fontsize=10)
    axes.tick_params(colors=INK, labelcolor=INK, labelsize=9.5, length=0, which="both")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    legend = [(COLOURS[k % len(COLOURS)], name) for k, name in enumerate(counts)]
    return Drawings([Drawing(figure, "occurrences of a code over the mean", first)], legend, caption)


def _panel(
    setting: str, x: Sequence[Any], series: Sequence[str], panel: Panel, rows: Sequence[int], names: Sequence[str]
) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(3.7, 2.55))
    axes = figure.add_axes((0.15, 0.19, 0.83, 0.77))
    there: list[float] = []
    for k, name in enumerate(names):
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        style = "-" if k < len(COLOURS) else "--"
        y = {i: float(v) for i in rows if series[i] == name and (v := panel.values[i]) is not None and _is_number(v)}
        at: dict[float, list[int]] = {}
        for i in y:
            at.setdefault(float(x[i]), []).append(i)
        places = sorted(at)
        several = any(len(found) > 1 for found in at.values())
        there += y.values()
        if several:
            dots = [(place, y[i]) for place in places for i in at[place]]
            axes.plot(*zip(*dots, strict=True), marker, color=colour, alpha=0.5, markersize=3.5, markeredgewidth=0)
        if several and panel.better is None:
            continue
        pick = min if panel.better == "lower" else max
        chosen = [pick(at[place], key=y.__getitem__) for place in places]
        axes.plot(places, [y[i] for i in chosen], style, marker=marker, color=colour, lw=1.8, ms=5, mew=0)
        for place, i in zip(places, chosen, strict=True):
            interval = panel.intervals[i] if panel.intervals else None
            if interval is not None:
                axes.plot([place, place], interval, "-", color=colour, lw=1, alpha=0.7)
    if panel.better == "lower" and there and min(there) > 0 and max(there) > _WIDE * min(there):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks = sorted({float(x[i]) for i in rows})
    if ticks[0] > 0 and ticks[-1] >= 8 * ticks[0]:
        axes.set_xscale("log", base=2)
    kept = _apart(ticks, logarithmic=axes.get_xscale() == "log")
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(setting, color=INK, fontsize=10)
    axes.tick_params(colors=INK, labelcolor=INK, labelsize=9.5, length=0, which="both")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    return figure


def _apart(ticks: Sequence[float], *, logarithmic: bool) -> list[float]:
    """Those ticks whose labels have room beside each other."""
    place = [math.log(tick) if logarithmic else tick for tick in ticks]
    room, kept = (place[-1] - place[0]) / 9, [0]
    for k in range(1, len(ticks)):
        if place[k] - place[kept[-1]] >= room:
            kept.append(k)
    return [ticks[k] for k in kept]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
