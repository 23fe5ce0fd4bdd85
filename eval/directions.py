"""Which way each measured value is better, and which ones bear the number of images in their name."""

import re
from collections.abc import Iterable
from functools import cache

from genkit import rewards
from genkit.eval.metrics._per_image import PerImage
from genkit.eval.metrics.base import PACKAGE, Better, Metric
from genkit.registry import members

_FRECHET = re.compile(r"(^|.*[_-])(r?fid|fd)([_\[-].*)?")


def better(name: str) -> Better | None:
    """``lower`` or ``higher``; None of a value that is better neither way, or that no metric declares.

    Metrics say it in ``Metric.better``; of rewards higher is better; and Frechet distances, which have their names
    from the extractors, are all called ``fid``, ``fd_...``, ``..._fid``, or such a name with ``[...]`` behind.
    """
    return _declared().get(name, "lower" if _FRECHET.fullmatch(name) else None)


def is_shown(name: str) -> bool:
    """Whether tables show the value unasked; others are details of one that is."""
    return name in _declared() or better(name) is not None


def values_of(metric: str, there: Iterable[str]) -> list[str]:
    """Which of the values ``there`` the metric of that name gives and tables show: ``frechet`` gives ``fid``."""
    cls = members(PACKAGE, Metric).get(metric)  # type: ignore[type-abstract]
    if cls is None:
        return []
    return [name for name in there if name in cls.better or metric == "frechet" and _FRECHET.fullmatch(name)]


def with_count(name: str, n: int | None) -> str:
    """``fid@5k``: distances of sets depend on how many images there are, so their heads say it; others as they are."""
    if n is None or not (name in _of_sets() or _FRECHET.fullmatch(name)):
        return name
    return f"{name}@{n // 1000}k" if n % 1000 == 0 and n else f"{name}@{n}"


@cache
def _declared() -> dict[str, Better | None]:
    found: dict[str, Better | None] = dict.fromkeys(rewards.names(), "higher")
    for metric in members(PACKAGE, Metric).values():  # type: ignore[type-abstract]
        found |= metric.better
    return found


@cache
def _of_sets() -> set[str]:
    of_sets = [metric for metric in members(PACKAGE, Metric).values() if not issubclass(metric, PerImage)]  # type: ignore[type-abstract]
    return {name for metric in of_sets for name, way in metric.better.items() if way == "lower"}
