"""What a page shows of images: the first ones side by side, the worst and the best, and values by class."""

from collections.abc import Iterable, Sequence
from typing import Any

from genkit.eval.blocks import Details, Strip, Strips, short
from genkit.eval.directions import better
from genkit.eval.report import Block, Column, Table
from genkit.eval.runs import Run
from genkit.eval.saved import extremes

RUNS, IMAGES, EXTREMES, CLASSES = 24, 10, 10, 40


def first_blocks(runs: Sequence[Run]) -> list[Block | str]:
    """The first images of every run, item by item in columns."""
    shown = [run for run in runs if "first" in run.evaluation.images]
    if not shown:
        return []
    count = min(IMAGES, max(len(run.evaluation.images["first"]) for run in shown))
    items = _common(_items(run)[:count] for run in shown)
    labels = _common(_labels(run, count) for run in shown)
    heads = [
        " · ".join([*([] if items is None else [f"#{items[i] + 1}"]), *([] if labels is None else [str(labels[i])])])
        for i in range(count)
    ]
    rows = [Strip(run.name, run.evaluation.images["first"][:count]) for run in shown[:RUNS]]
    words = f"{count} images of each run" + (": a column is one item" if items else "")
    words += ", with its number and the class it was asked for." if items and labels else "."
    return [Strips(rows, heads, caption=words + _of(shown))]


def _common(found: Iterable[Any]) -> Any:
    """What all have, or None."""
    first, *rest = found
    return first if all(other == first for other in rest) else None


def _items(run: Run) -> list[int]:
    """The numbers of a run's first images; earlier versions showed them as they came."""
    items = run.evaluation.items
    return list(range(len(run.evaluation.images["first"]))) if items is None else items.tolist()


def extreme_blocks(runs: Sequence[Run]) -> list[Block | str]:
    """The images with the worst and the best score, which stands below each."""
    blocks: list[Block | str] = []
    for side in ("worst", "best"):
        for score in dict.fromkeys(run.evaluation.ranked for run in runs if side in run.evaluation.images):
            if score is None:
                continue
            shown = [run for run in runs if run.evaluation.ranked == score and side in run.evaluation.images]
            rows = []
            for run in shown[:RUNS]:
                of = run.evaluation.scores
                values = of[score][extremes(of)[side][:EXTREMES]].tolist()
                rows.append(Strip(run.name, run.evaluation.images[side][:EXTREMES], [short(v) for v in values]))
            words = f"{score}, which stands below each image, is better where it is {better(score)}."
            if score == "realism":
                words += " From 1 on, an image lies as near to a real one as that one's neighbours (arXiv 1904.06991)."
            words += _of(shown)
            blocks.append(Strips(rows, title=f"The {side} by {score}", caption=words, folded_after=4))
    return blocks


def code_blocks(runs: Sequence[Run], first: int) -> list[Block | str]:
    """How tokenizers use their codes: a table, and codes from the commonest to the rarest."""
    from genkit.eval.plots import usage

    shown = [(run, of.tolist()) for run in runs if (of := run.evaluation.code_counts) is not None][:RUNS]
    if not shown:
        return []
    rows = [
        [run.name, len(of), sum(of), *(run.result.values.get(f"code_{name}") for name in ("usage", "usage_expected"))]
        + [run.result.values.get("code_perplexity")]
        for run, of in shown
    ]
    heads: list[str | Column] = ["run", "codes", "tokens", Column("codes used", "higher", 4)]
    heads += [Column("if tokens were uniform", None, 4), Column("perplexity", "higher", 4)]
    words = "Codes of each run from the commonest to the rarest; those that never occur have no line."
    return [Table(heads, rows), usage({run.name: of for run, of in shown}, words, first)]


def class_blocks(runs: Sequence[Run]) -> list[Block | str]:
    """Values by class: a table of the first run that has some, and of others folded."""
    shown = [run for run in runs if run.result.per_class]
    if not shown:
        return []
    rest: list[Block] = [Details(run.name, [_classes(run)]) for run in shown[1:RUNS]]
    more: list[Block] = [Details(f"{len(rest)} more", rest)] if rest else []
    return [f"{shown[0].name}:", _classes(shown[0]), *more, *([_of(shown).strip()] if len(shown) > RUNS else [])]


def _classes(run: Run) -> Table:
    found = run.result.per_class
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    ranks = next((name for name in names if better(name)), None)
    order = list(found)
    words = "Distances of so few images are far above that of all, and compare with classes of as many alone."
    if len(order) > CLASSES and ranks is not None:
        sign = 1 if better(ranks) == "lower" else -1
        known = sorted((c for c in order if ranks in found[c]), key=lambda c: sign * found[c][ranks])
        half = CLASSES // 2
        order = [*known[:half], *known[-half:]]
        words += f" The best and the worst {half} of {len(found)} classes by {ranks}; all are in result.json."
    columns: list[str | Column] = ["class", *(Column(_title(name), better(name)) for name in names)]
    rows: list[list[Any]] = [
        [int(c) if c.lstrip("-").isdecimal() else c, *(_count(name, found[c].get(name)) for name in names)]
        for c in order
    ]
    return Table(columns, rows, words)


def _title(name: str) -> str:
    return {"n_gen": "generated images", "n_real": "real images"}.get(name, name)


def _count(name: str, value: float | None) -> Any:
    return int(value) if value is not None and name in ("n_gen", "n_real") else value


def _labels(run: Run, count: int) -> list[int] | None:
    labels = run.evaluation.labels
    return None if labels is None else labels[_items(run)[:count]].tolist()


def _of(shown: Sequence[Run]) -> str:
    return f" The first {RUNS} runs of {len(shown)}." if len(shown) > RUNS else ""
