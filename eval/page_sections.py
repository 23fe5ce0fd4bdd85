"""What the sections of a page say of a comparison, beside its images."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from genkit.eval.blocks import Callout, Card, Cards, Details, Heatmap, short
from genkit.eval.comparison import WAYS, Comparison
from genkit.eval.correlate import caption, correlate, head
from genkit.eval.mmhm import METRICS
from genkit.eval.plots import Panel, against
from genkit.eval.report import Block, Cell, Column, ProtocolBlock, Section, Table
from genkit.eval.result import COMPARED
from genkit.eval.runs import COSTS, NO_GUIDER, Run
from genkit.eval.selection import call_rows

_NAMES = {"guidance_scale": "guidance", "nfe": "calls"}


def subtitle(made: Comparison) -> str:
    """What is compared with what, in a line."""
    one = made.runs[0].result.protocol
    parts = [f"{len(made.runs)} evaluations" if len(made.runs) > 1 else "One evaluation"]
    if made.differing:
        return f"{parts[0]} of different protocols"
    if one.reference is not None:
        parts.append(f"against {one.reference}" + (f" (n = {one.n_real:,})" if one.n_real else ""))
    if one.n_gen:
        parts.append(f"{one.n_gen:,} generated images each")
    return " · ".join([*parts, f"extractor {one.extractor}"])


def summary(made: Comparison) -> list[Block | str]:
    """The winners, and every value in a table."""
    blocks: list[Block | str] = []
    if made.differing:
        told = "; ".join(f"{name}: {' / '.join(map(str, values))}" for name, values in made.differing.items())
        blocks.append(
            Callout(
                "Protocols differ (--force).",
                f"These values may not compare, and no winner is named. The runs differ in {told}.",
            )
        )
    elif len(made.runs) > 1:
        blocks.append(Cards(_winners(made)))
    # Words are in the runs' names already; numbers are what one sorts by.
    numeric = {key: made.setting(key) for key in made.settings if all(_sorts(v) for v in made.setting(key))}
    other = [key for key in ("n_gen", "n_real", "extractor") if key in made.differing]
    columns: list[str | Column] = ["run", *([Column("MMHM", made.crowned("mmhm"), 4)] if made.ranking else [])]
    columns += [key.replace("_", " ") for key in other]
    columns += [Column(made.head(name), made.crowned(name), 4) for name in made.metrics]
    columns += [_words(key) for key in numeric]
    rows: list[list[Any]] = []
    for i, run in enumerate(made.runs):
        row: list[Any] = [run.name]
        if made.ranking:
            ranked = made.ranking["rows"][i]
            row.append(Cell(ranked["mmhm"], "Pareto" if ranked["mmhm_pareto"] else ""))
        row += [_field(run, key) for key in other] + [_cell(run, name) for name in made.metrics]
        rows.append([*row, *(values[i] for values in numeric.values())])
    words = "A click on a head sorts."
    if not made.differing:
        words += " Arrows point to the better way, and the best value of a column is marked."
    if any(run.result.intervals for run in made.runs):
        words += " Below values are their 95 % intervals."
    if made.ranking:
        words += " No other run is as good in every metric of MMHM and better in one, where Pareto is written."
    return [*blocks, Table(columns, rows, words), *filter(None, [made.why_not])]


def _sorts(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(run: Run, name: str) -> Any:
    value = run.result.values.get(name)
    between = run.result.intervals.get(name)
    return value if between is None else Cell(value, f"{short(between[0])} – {short(between[1])}")


def _winners(made: Comparison) -> list[Card]:
    cards = []
    if made.ranking:
        first, share = made.ranking["rows"][0], made.ranking["stability"]
        told = "" if share is None else f"; stays first in {share:.0%} of tables without one other run"
        cards.append(Card("Winner by MMHM", made.runs[0].name, f"{first['mmhm']:.4g}{told}", main=True))
    for name in made.metrics:
        way, values = made.better(name), made.values(name)
        known = [value for value in values if value is not None]
        if way is None or len(known) < 2:
            continue
        best = min(known) if way == "lower" else max(known)
        names = [run.name for run, value in zip(made.runs, values, strict=True) if value == best]
        also = f" and {len(names) - 1} more" if len(names) > 1 else ""
        cards.append(Card(head(made.head(name), way), names[0] + also, short(best, 4)))
    return cards


def mmhm(made: Comparison, ranking: Mapping[str, Any]) -> list[Block | str]:
    """How MMHM came about, and how far it can be trusted."""
    share, rows = ranking["stability"], ranking["rows"]
    words = (
        "MMHM is the harmonic mean of the metrics, each scaled to [0, 1] between the worst and the best of these runs, "
        f"and at most 1 + eps = {1 + ranking['eps']:g}."
    )
    if share is not None and not made.differing:
        words += f" The winner stays the winner in {share:.0%} of the tables that lack one other run."
    front = sum(row["mmhm_pareto"] for row in rows)
    words += f" {front} of {len(rows)} runs are on the Pareto front, and marked in the summary."
    bounds = Table(
        ["metric", "better", Column("lower bound", digits=5), Column("upper bound", digits=5), "weight"],
        [
            [made.head(name), WAYS[way], ranking["bounds"][name]["min"], ranking["bounds"][name]["max"], weight]
            for (name, way), weight in zip(ranking["metrics"].items(), ranking["weights"].values(), strict=True)
        ],
        f"The bounds of MMHM; eps {ranking['eps']:g}. Scores of tables with other bounds do not compare.",
    )
    columns: list[str | Column] = [
        "run",
        Column("MMHM", made.crowned("mmhm"), 4),
        *(Column(f"u of {name}", made.crowned("mmhm")) for name in ranking["metrics"]),
    ]
    scaled = Table(
        columns,
        [
            [run.name, row["mmhm"], *(row[f"mmhm_u_{name}"] for name in ranking["metrics"])]
            for run, row in zip(made.runs, rows, strict=True)
        ],
    )
    # Rows of a note are those of the table that was ranked, before it was put in order.
    named = {row["mmhm_row"]: f"“{run.name}”" for run, row in zip(made.runs, rows, strict=True)}
    notes = call_rows([note for note in ranking["notes"] if not note.startswith("forced")], named)
    return [words, bounds, Details("The scaled metrics u that enter the mean", [scaled]), *map(_sentence, notes)]


def plots(made: Comparison) -> list[Section]:
    """Metrics against steps and against guidance, where several of these were run."""
    names = [*(["mmhm"] if made.ranking else []), *made.metrics]
    found: list[Section] = []
    for setting, other in (("steps", "guidance_scale"), ("guidance_scale", "steps")):
        kept = [key for key in made.settings if key not in (setting, other, *COSTS)]
        panels = [_panel(made, name) for name in names]
        words = "Arrows point to the better way."
        if other in made.settings:
            words += f" Dots are all runs; a line joins the best of those that differ in {_words(other)} alone."
        if any(run.result.intervals for run in made.runs):
            words += " Bars are 95 % intervals."
        x, series = made.setting(setting), _lines(made, kept)
        drawn = against(_words(setting), x, series, panels, words, len(found) * len(panels))
        if drawn is not None:
            found.append(Section(f"Against {_words(setting)}", [drawn]))
    return found


def _lines(made: Comparison, kept: list[str]) -> list[str]:
    """The line that each run is on; of several guiders those without guidance are on one of their own."""
    guiders = {run.settings.get("guider") for run in made.runs} - set(NO_GUIDER)
    told = [key for key in kept if key != "guider" or len(guiders) > 1]

    def word(key: str, value: Any) -> str:
        return "no guidance" if key == "guider" and value in NO_GUIDER else "" if value is None else str(value)

    return [", ".join(filter(None, [word(key, run.settings.get(key)) for key in told])) for run in made.runs]


def _panel(made: Comparison, name: str) -> Panel:
    intervals = [run.result.intervals.get(name) for run in made.runs]
    return Panel(made.head(name), made.values(name), made.better(name), intervals)


def _sentence(note: str) -> str:
    return note[:1].upper() + note[1:].rstrip(".") + "."


def _words(setting: str) -> str:
    return _NAMES.get(setting, setting.replace("_", " "))


def correlations(made: Comparison) -> list[Block | str]:
    """How far the metrics agree over these runs."""
    try:
        found = correlate(
            [run.row for run in made.runs],
            mmhm=made.ranking["metrics"] if made.ranking else METRICS,
            force=True,  # the page has said so
        )
    except ValueError as error:
        return [f"There are none: {error}."]
    names = [head(made.head(name), found["better"][name]) for name in found["metrics"]]
    notes = [note for note in found["notes"] if not note.startswith("forced")]
    return [Heatmap(names, found["matrix"], caption(found)), *map(_sentence, notes)]


def notes(made: Comparison) -> list[Block | str]:
    """What the evaluations warn of, counted."""
    counted = Counter(note for run in made.runs for note in dict.fromkeys(run.result.notes))
    n = len(made.runs)
    rows = [[note, count if n > 1 else None] for note, count in counted.most_common()]
    rows += [[note, None] for note in made.notes]
    if not rows:
        return ["No evaluation had anything to warn of."]
    return [Table(["what the evaluations warn of", f"runs, of {n}"], rows)]


def protocol(made: Comparison) -> list[Block | str]:
    """How it was measured; of different protocols, in what they differ."""
    one = made.runs[0].result.protocol.model_dump(exclude_none=True)
    if not made.differing:
        return [ProtocolBlock({name: value for name, value in one.items() if name != "generated"})]
    columns = ["run", *(name.replace("_", " ") for name in made.differing)]
    rows = [[run.name, *(_field(run, name) for name in made.differing)] for run in made.runs]
    same = {name: one[name] for name in COMPARED if name in one and name not in made.differing}
    return [Table(columns, rows, "What the protocols differ in."), ProtocolBlock(same)]


def _field(run: Run, name: str) -> Any:
    kept = run.result.protocol.model_dump(mode="json")
    found = kept["metrics"].get(name.removeprefix("metrics.")) if name.startswith("metrics.") else kept.get(name)
    return found if isinstance(found, int | None) else str(found)
