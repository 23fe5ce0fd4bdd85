"""Runs side by side: which metrics are shown of them, how MMHM ranks them, and whether they may be compared at all."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from genkit.eval.directions import better, is_shown, values_of, with_count
from genkit.eval.metrics.base import Better
from genkit.eval.mmhm import METRICS, Direction
from genkit.eval.result import differences
from genkit.eval.runs import Run, telling
from genkit.eval.selection import canonical, rank_rows

WAYS: dict[str, Better] = {"min": "lower", "max": "higher"}


@dataclass(frozen=True)
class Comparison:
    """Runs, best first where MMHM ranks them; the metrics shown; MMHM's result or why there is none."""

    runs: Sequence[Run]
    metrics: Sequence[str]
    ranking: Mapping[str, Any] | None
    why_not: str
    differing: Mapping[str, list[Any]]
    notes: Sequence[str]

    def better(self, name: str) -> Better | None:
        """Which way a metric is better: as MMHM was told, else as it declares."""
        told = (self.ranking or {}).get("metrics", {}).get(name)
        return WAYS[told] if told else "higher" if name == "mmhm" else better(name)

    def crowned(self, name: str) -> Better | None:
        """Which way the best of a metric is chosen: as it is better, but none is best across protocols."""
        return None if self.differing else self.better(name)

    def head(self, name: str) -> str:
        """A metric's name, with n where it is a distance of sets and all have as many images on both sides."""
        counts = {(run.result.protocol.n_gen, run.result.protocol.n_real) for run in self.runs}
        return "MMHM" if name == "mmhm" else with_count(name, counts.pop()[0] if len(counts) == 1 else None)

    def values(self, name: str) -> list[float | None]:
        if name == "mmhm":
            return [row["mmhm"] for row in self.ranking["rows"]] if self.ranking else []
        return [run.result.values.get(name) for run in self.runs]

    @cached_property
    def settings(self) -> list[str]:
        """What tells the runs apart."""
        return telling([run.settings for run in self.runs])

    def setting(self, key: str) -> list[Any]:
        """A setting by run; of numbers all are whole or none is."""
        values = [run.settings.get(key) for run in self.runs]
        fractions = any(isinstance(value, float) for value in values)
        return [float(v) if fractions and isinstance(v, int) and not isinstance(v, bool) else v for v in values]


def compare(
    runs: Sequence[Run],
    *,
    metrics: Sequence[str] | None = None,
    mmhm: Mapping[str, Direction] | None = None,
    force: bool = False,
    notes: Sequence[str] = (),
) -> Comparison:
    """Put runs side by side.

    Args:
        metrics: which are shown, and in which order: names of values, or of metrics that give several (``prdc``). By
            default every one that some run has, without the details that its metric does not declare
            (``Metric.better``).
        mmhm: what MMHM is made of. By default the published four, where all runs have them.
        force: compare runs of different protocols all the same; the page says so.

    Raises:
        ValueError: runs of different protocols, a metric that no run has, one of ``mmhm`` that a run lacks.
    """
    differing = differences([run.result.protocol.model_dump(mode="json") for run in runs])
    if differing and not force:
        told = "; ".join(f"{name}: {', '.join(map(repr, values))}" for name, values in differing.items())
        raise ValueError(f"runs of different protocols cannot be compared ({told}); --force shows them all the same")
    there = list(dict.fromkeys(name for run in runs for name in run.result.values))
    if metrics is None:
        shown = [name for name in there if is_shown(name)]
    else:
        named = [[name] if (name := canonical(m)) in there else values_of(name, there) or [name] for m in metrics]
        shown = list(dict.fromkeys(itertools.chain(*named)))
    for name in shown:
        if name not in there:
            raise ValueError(f"metrics: no run has {name!r}. There are: {', '.join(there) or 'none'}")
    if not shown:
        raise ValueError(f"metrics: none of {', '.join(there) or 'nothing'} is shown unasked; name some")
    ranking, why_not = None, ""
    lacking = [name for name in mmhm or METRICS if any(name not in run.result.values for run in runs)]
    if len(runs) < 2:
        why_not = "MMHM ranks at least two runs."
    elif lacking and mmhm is None:
        told = ", ".join(lacking)
        why_not = f"There is no MMHM: some runs lack {told}. Others than the published four are named by --mmhm."
    else:
        for name in lacking:
            without = [run.name for run in runs if name not in run.result.values]
            if len(without) < len(runs):
                raise ValueError(f"mmhm: {name!r} is not among the values of {', '.join(map(repr, without))}")
        rows = [run.row for run in runs]
        ranking = rank_rows(rows, metrics=mmhm or METRICS, force=force)
        runs = [runs[row["mmhm_row"] - 1] for row in ranking["rows"]]
    return Comparison(runs, shown, ranking, why_not, differing, notes)
