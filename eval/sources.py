"""What an evaluation is given, before anything is measured: opened, cut to size, and which metrics it allows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit.eval.extractors.base import Extractor
from genkit.eval.feature_files import is_features, load_features
from genkit.eval.inputs import ImageSet, draw, drawn, read_images
from genkit.eval.metrics.base import FeatureSet, Metric, all_metrics, get_metric
from genkit.eval.statistics import FeatureStats, is_statistics


def open_set(
    source: Any, role: str, extractor: Extractor, n: int | None, seed: int, strict: bool
) -> ImageSet | FeatureSet:
    """``source`` as images still to be measured, cut to ``n``, or as statistics that ``extractor`` may have made."""
    if isinstance(source, str | Path) and is_features(source):
        source = load_features(source)
    elif isinstance(source, str | Path) and Path(source).is_file() and is_statistics(source):
        name = Path(source).name
        source = FeatureStats.load(source)
        source.meta.setdefault("source", name)
    if isinstance(source, FeatureStats):
        source = FeatureSet(source)
    if isinstance(source, FeatureSet):
        _check_statistics(source.stats, role, extractor)
        opened: ImageSet | FeatureSet = _cut(source, n, seed, role)
        notes = source.stats.meta.get("notes")
    else:
        opened = drawn(read_images(source, strict=strict), n, seed, role)
        notes = opened.notes
    if strict and notes:
        raise ValueError(f"strict: the {role} set: {'; '.join(notes)}")
    return opened


def _cut(side: FeatureSet, n: int | None, seed: int, role: str) -> FeatureSet:
    """To those rows that would have been drawn of the images."""
    if n is None or n == side.stats.n:
        return side
    if side.features is None:
        raise ValueError(f"{role} statistics are of n={side.stats.n} images and cannot be cut to n={n}")
    if len(side.features) < n:
        raise ValueError(f"{role} set has the features of {len(side.features)} images, {n} are needed")
    return side.subset(draw(len(side.features), n, seed, role))


def _check_statistics(stats: FeatureStats, role: str, extractor: Extractor) -> None:
    made_with = stats.meta.get("extractor")
    if made_with is not None and made_with != extractor.id:
        raise ValueError(
            f"{role} statistics were made with extractor {made_with!r}, this evaluation uses {extractor.id!r}"
        )
    if stats.dim != extractor.dim:
        raise ValueError(f"{role} statistics have {stats.dim} dimensions, extractor {extractor.id!r} {extractor.dim}")


def known_fields(source: ImageSet | FeatureSet | None, extractor: Extractor) -> set[str]:
    """What of a ``FeatureSet`` will be known of ``source``, before anything is measured."""
    if source is None:
        return set()
    if isinstance(source, FeatureSet):
        return source.fields
    known = {
        "stats": extractor.dim,
        "features": extractor.dim,
        "logits": extractor.num_classes,
        "labels": source.labels is not None,
        "images": True,
        "prompts": source.prompts is not None,
        "model": source.model is not None,
    }
    return {field for field, there in known.items() if there}


def possible_metrics(
    metrics: Sequence[str | Metric] | None,
    reference: set[str],
    generated: set[str],
    *,
    sources: Sequence[ImageSet | FeatureSet | None] | None = None,
) -> list[Metric]:
    """The metrics asked for, or if None all default ones that the fields of both sides allow.

    Errors name those that are possible; with ``sources`` without those that would refuse them.
    """
    possible = [metric for metric in all_metrics() if not metric.missing(reference, generated)]
    offered = [metric.name for metric in possible if sources is None or _takes(metric, sources)]
    names = ", ".join(offered) or "none"
    if metrics is None:
        usual = [metric for metric in possible if metric.by_default]
        if not usual:
            raise ValueError(f"no default metric is possible with these inputs. Possible here: {names}.")
        return usual
    chosen = [get_metric(metric) for metric in metrics]
    if not chosen:
        raise ValueError(f"metrics is empty. Possible here: {names}.")
    for i, metric in enumerate(chosen):
        missing = metric.missing(reference, generated)
        if missing:
            raise ValueError(f"metrics: {metric.name!r} needs {', '.join(missing)}. Possible here: {names}.")
        if metric.name in [other.name for other in chosen[:i]]:
            raise ValueError(f"metrics: {metric.name!r} is named twice")
    return chosen


def _takes(metric: Metric, sources: Sequence[ImageSet | FeatureSet | None]) -> bool:
    try:
        metric.check(*sources)
    except ValueError:
        return False
    return True
