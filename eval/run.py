"""Evaluate a set of generated images: one pass of the extractor over each side, any number of metrics, one result."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch
from tqdm.auto import tqdm

import genkit
from genkit.eval.extractors.base import Extractor, extract, get_extractor
from genkit.eval.inputs import ImageSet, read_images
from genkit.eval.metrics.base import FeatureSet, Metric, all_metrics, get_metric, metric_name
from genkit.eval.result import Protocol, Result
from genkit.eval.statistics import FeatureStats, is_statistics


def measure(
    images: ImageSet,
    extractor: Extractor,
    *,
    keep: bool = True,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> FeatureSet:
    """One pass over ``images``: their statistics, and with ``keep`` the features and logits themselves."""
    stats = FeatureStats(extractor.dim)
    features, logits = [], []
    bar = tqdm(total=images.n, desc=f"features of {images.name}", unit="image", delay=2, disable=quiet or None)
    with bar:
        for out in extract(extractor, images.batches(batch_size), device):
            stats.update(out.features)
            if keep:
                features.append(out.features)
            if out.logits is not None:
                logits.append(out.logits)
            bar.update(len(out.features))
    stats.meta = {"extractor": extractor.id, "source": images.name}
    return FeatureSet(
        stats, torch.cat(features) if keep else None, torch.cat(logits) if logits else None, images.labels
    )


def evaluate(
    reference: Any,
    generated: Any,
    *,
    metrics: Sequence[str | Metric] | None = None,
    extractor: str | Extractor = "digits",
    n: int | None = None,
    nfe: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> Result:
    """Compare ``generated`` with ``reference``.

    Args:
        reference: images as ``inputs.read_images`` takes them, ``FeatureStats`` or their ``.npz``, a ``FeatureSet`` of
            ``measure`` (to measure the reference once for many generated sets), or None for metrics that need none.
        generated: the same, except None.
        metrics: names or ``Metric`` objects; None for every metric that these inputs allow.
        extractor: a name or an ``Extractor``.
        n: use only this many images of each side, drawn at random with ``seed``.
        nfe: network calls spent on each generated image, to be recorded.

    Raises:
        ValueError: inputs that cannot be read or are too few, statistics made with another extractor, or a metric
            that needs what is not there (the error says what, and which metrics are possible).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    if n is not None and n < 2:
        raise ValueError(f"n={n}: expected at least 2")
    chosen = [get_metric(metric) for metric in (all_metrics() if metrics is None else metrics)]
    if not chosen:
        raise ValueError("metrics is empty: name at least one, or pass None for all that are possible")
    extractor = get_extractor(extractor)
    sources = [None if reference is None else _open(reference), _open(generated)]
    keeps = [
        any("features" in reads for reads in needs)
        for needs in ([m.reads_reference for m in chosen], [m.reads_generated for m in chosen])
    ]
    sides: list[FeatureSet | None] = []
    for role, source, keep in zip(("reference", "generated"), sources, keeps, strict=True):
        if isinstance(source, ImageSet):
            source = _subset(source, role, n, seed)
            keep = keep or source.n < extractor.dim  # the exact route of the Frechet distance for few samples
            source = measure(source, extractor, keep=keep, batch_size=batch_size, device=device, quiet=quiet)
        elif source is not None:
            _check_measured(source, role, extractor, n)
        sides.append(source)
    real, fake = sides
    assert fake is not None

    possible = [metric for metric in chosen if not metric.missing(real, fake)]
    if metrics is not None and len(possible) < len(chosen):
        lacking = next(metric for metric in chosen if metric not in possible)
        raise ValueError(
            f"metrics: {metric_name(lacking)!r} needs {', '.join(lacking.missing(real, fake))}. "
            f"Possible here: {', '.join(metric_name(m) for m in all_metrics() if not m.missing(real, fake)) or 'none'}."
        )
    if not possible:
        raise ValueError("no metric is possible with these inputs")
    values: dict[str, float] = {}
    for metric in possible:
        values |= metric(real, fake)
    protocol = Protocol(
        extractor=extractor.id,
        reference=None if real is None else str(real.stats.meta.get("source", "statistics")),
        generated=str(fake.stats.meta.get("source", "statistics")),
        n_real=None if real is None else real.stats.n,
        n_gen=fake.stats.n,
        metrics={metric_name(metric): dict(vars(metric)) for metric in possible},
        seed=seed,
        device=str(device),
        versions={
            "genkit": genkit.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "numpy": numpy.__version__,
        },
    )
    return Result(values=values, nfe=nfe, protocol=protocol, notes=_notes(real, fake))


def _open(source: Any) -> ImageSet | FeatureSet:
    if isinstance(source, FeatureSet):
        return source
    if isinstance(source, FeatureStats):
        return FeatureSet(source)
    if isinstance(source, str | Path) and Path(source).is_file() and is_statistics(source):
        stats = FeatureStats.load(source)
        stats.meta.setdefault("source", Path(source).name)
        return FeatureSet(stats)
    return read_images(source)


def _subset(images: ImageSet, role: str, n: int | None, seed: int) -> ImageSet:
    if images.n < (n or 2):
        raise ValueError(f"{role} set {images.name!r} has {images.n} images, {n or 2} are needed")
    if n is None or n == images.n:
        return images
    chosen = torch.randperm(images.n, generator=torch.Generator().manual_seed(seed))[:n]
    return images.subset(chosen.sort().values)


def _check_measured(side: FeatureSet, role: str, extractor: Extractor, n: int | None) -> None:
    made_with = side.stats.meta.get("extractor")
    if made_with is not None and made_with != extractor.id:
        raise ValueError(
            f"{role} statistics were made with extractor {made_with!r}, this evaluation uses {extractor.id!r}"
        )
    if side.stats.dim != extractor.dim:
        raise ValueError(
            f"{role} statistics have {side.stats.dim} dimensions, extractor {extractor.id!r} {extractor.dim}"
        )
    if n is not None and side.stats.n != n:
        raise ValueError(f"{role} statistics are of n={side.stats.n} images and cannot be cut to n={n}")


def _notes(real: FeatureSet | None, fake: FeatureSet) -> list[str]:
    notes = []
    for role, side in (("reference", real), ("generated", fake)):
        if side is None:
            continue
        if side.stats.n is None:
            notes.append(f"the {role} statistics do not say how many images they are of")
        elif side.stats.n < side.stats.dim:
            notes.append(f"the {role} set has fewer images ({side.stats.n}) than feature dimensions ({side.stats.dim})")
        if "extractor" not in side.stats.meta:
            notes.append(f"the {role} statistics do not say which extractor they were made with")
    if real is not None and real.stats.n != fake.stats.n:
        notes.append(
            f"{real.stats.n} real and {fake.stats.n} generated images: recall and coverage depend on both counts"
        )
    return notes


def main(
    reference: str,
    generated: str,
    *,
    metrics: Sequence[str] | None = None,
    extractor: str = "digits",
    n: int | None = None,
    nfe: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "cpu",
    json_path: str | Path | None = None,
    html_path: str | Path | None = None,
    quiet: bool = False,
) -> Result:
    """``genkit eval run REFERENCE GENERATED``: evaluate, print a table unless ``quiet``, write the files asked for.

    Arguments and errors are those of ``evaluate``; an output folder that does not exist is refused before work starts.
    """
    for path in (json_path, html_path):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: the folder {Path(path).absolute().parent} does not exist")
    result = evaluate(
        reference,
        generated,
        metrics=metrics,
        extractor=extractor,
        n=n,
        nfe=nfe,
        seed=seed,
        batch_size=batch_size,
        device=device,
        quiet=quiet,
    )
    if json_path is not None:
        result.save(json_path)
    if html_path is not None:
        _write_html(html_path, result, reference, generated)
    if not quiet:
        _print(result)
    return result


def _print(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    protocol = result.protocol
    table = Table(title=f"{protocol.generated} against {protocol.reference}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result.values.items():
        table.add_row(name, f"{value:.6g}")
    if result.nfe is not None:
        table.add_row("network calls (NFE)", f"{result.nfe:g}")
    console = Console()
    console.print(table)
    console.print(f"extractor {protocol.extractor}, n_real {protocol.n_real}, n_gen {protocol.n_gen}", highlight=False)
    for note in result.notes:
        console.print(f"note: {note}", highlight=False)


def _write_html(path: str | Path, result: Result, reference: str, generated: str) -> None:
    from genkit.eval.report import Gallery, ImageGrid, ProtocolBlock, Section, Table, write_report

    rows: list[tuple[str, float]] = list(result.values.items())
    if result.nfe is not None:
        rows.append(("network calls (NFE)", result.nfe))
    sides = [(name, _open(source)) for name, source in (("reference", reference), ("generated", generated))]
    grids = []
    for name, images in sides:
        if isinstance(images, ImageSet):
            first = torch.arange(min(images.n, 60))
            grids.append(ImageGrid(images.load(first), f"{name}: the first {len(first)} of {images.name}"))
    sections = [Section("Values", [Table(["metric", "value"], rows), *result.notes])]
    if grids:
        sections.append(Section("Images", [Gallery(grids)]))
    sections.append(Section("Protocol", [ProtocolBlock(result.protocol)]))
    write_report(path, f"{result.protocol.generated} against {result.protocol.reference}", *sections)
