"""Evaluate a set of generated images: one pass of the extractor over each side, any number of metrics, one result."""

import contextlib
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy
import torch
from torch import Tensor
from tqdm.auto import tqdm

import genkit
from genkit.eval.extractors.base import Extractor, extract, get_extractor
from genkit.eval.inputs import ImageSet, UnreadableImage, same_images
from genkit.eval.metrics._per_image import PerImage
from genkit.eval.metrics.base import FeatureSet, Metric
from genkit.eval.processes import gather, gather_rows, own, rank_and_count
from genkit.eval.result import Protocol, Result
from genkit.eval.saved import refuse_other, save_evaluation
from genkit.eval.sources import known_fields, open_set, possible_metrics
from genkit.eval.statistics import FeatureStats


class NoImages(ValueError):
    """Fewer than two images of a set can be read. Of several processes each raises it."""


def measure(
    images: ImageSet,
    extractor: Extractor,
    *,
    keep: bool = True,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    strict: bool = False,
    quiet: bool = False,
) -> FeatureSet:
    """One pass over ``images``: their statistics, and with ``keep`` the features and logits themselves.

    Of several processes (``torch.distributed``) each takes its share, every image once, and all return the whole.
    Images that cannot be read are left out and named in the notes of ``FeatureSet.images``; ``strict`` raises instead.
    """
    stats = FeatureStats(extractor.dim)
    features: list[Tensor] = []
    logits: list[Tensor] = []
    unreadable: dict[int, str] = {}
    rank, count = rank_and_count()
    rows = own(images.n, batch_size)

    def batches() -> Iterator[Tensor]:
        for indices in rows.split(batch_size):
            batch, bad = _read(images, indices, strict)
            unreadable.update(bad)
            bar.update(len(indices))
            if batch is not None:
                yield batch

    bar = tqdm(
        total=len(rows), desc=f"features of {images.name}", unit="image", delay=2, disable=quiet or rank > 0 or None
    )
    with bar:
        for out in extract(extractor, batches(), device):
            stats.update(out.features)
            if keep:
                features.append(out.features)
            if out.logits is not None:
                logits.append(out.logits)
    if count > 1:
        stats = stats.gather()
    unreadable = {i: message for share in gather(unreadable) for i, message in share.items()}
    if unreadable:
        images = _without(images, unreadable)
    stats.meta = {"extractor": extractor.id, "source": images.name, "distance": extractor.distance}
    stats.meta |= {"images": images.kind, "notes": list(images.notes), "class_names": images.class_names}
    return FeatureSet(
        stats,
        gather_rows(torch.cat(features) if features else torch.empty(0, extractor.dim)) if keep else None,
        gather_rows(torch.cat(logits) if logits else torch.empty(0, extractor.num_classes))
        if extractor.num_classes
        else None,
        images.labels,
        images,
        images.prompts,
        images.model,
    )


def _read(images: ImageSet, indices: Tensor, strict: bool) -> tuple[Tensor | None, dict[int, str]]:
    """The images that can be read, and why the others cannot."""
    try:
        return images.load(indices), {}
    except UnreadableImage as error:
        if strict:
            raise
        if len(indices) == 1:
            return None, {error.index: str(error)}
    parts = [_read(images, index, strict) for index in indices.split(1)]
    there = [batch for batch, _ in parts if batch is not None]
    return torch.cat(there) if there else None, {i: message for _, bad in parts for i, message in bad.items()}


def _without(images: ImageSet, unreadable: dict[int, str]) -> ImageSet:
    kept = torch.ones(images.n, dtype=torch.bool)
    kept[list(unreadable)] = False
    told = "; ".join(list(unreadable.values())[:5]) + ("; ..." if len(unreadable) > 5 else "")
    note = f"{len(unreadable)} of {images.n} images of {images.name} were left out: {told}"
    if kept.sum() < 2:
        raise NoImages(note)
    return replace(images.subset(kept.nonzero().flatten()), notes=(*images.notes, note))


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
    strict: bool = False,
    intervals: int | None = None,
    made_with: Mapping[str, Any] | None = None,
    command: str | None = None,
    output: str | Path | None = None,
    quiet: bool = False,
) -> Result:
    """Compare ``generated`` with ``reference``.

    Under ``torch.distributed`` every process calls it with the same arguments, measures its share, and has the result.

    Args:
        reference: images as ``inputs.read_images`` takes them, ``FeatureStats`` or their ``.npz``, a ``FeatureSet`` of
            ``measure`` (to measure the reference once for many generated sets), or None for metrics that need none.
        generated: the same, except None.
        metrics: names or ``Metric`` objects; None for every default metric that these inputs allow.
        extractor: a name or an ``Extractor``.
        n: use only this many images of each side, drawn at random with ``seed``.
        nfe: network calls spent on each generated image, to be recorded; those that a model makes meanwhile are
            counted.
        strict: stop at what would be a note: an image that cannot be read, or is not like the others.
        intervals: that many random halves of the generated set, for 95 % intervals (:mod:`genkit.eval.intervals`);
            a note says of which metrics there is none, and why.
        made_with: what the generated images were made with, to be recorded.
        command: the command line that this is part of, to be recorded.
        output: a folder for the result with samples, values by class, worst and best images: what reports are made of
            (:mod:`genkit.eval.saved`).

    Raises:
        ValueError: inputs that cannot be read or are too few, statistics made with another extractor, or a metric
            that needs what is not there (the error says what, and which metrics are possible);
            an ``output`` with a finished evaluation of other settings.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    if n is not None and n < 2:
        raise ValueError(f"n={n}: expected at least 2")
    if intervals is not None and intervals < 2:
        raise ValueError(f"intervals={intervals}: expected at least 2 halves")
    if nfe is not None and not nfe >= 0:
        raise ValueError(f"nfe={nfe}: expected 0 or more")
    extractor = get_extractor(extractor)
    sources = [
        None if source is None else open_set(source, role, extractor, n, seed, strict)
        for role, source in (("reference", reference), ("generated", generated))
    ]
    if nfe is not None and sources[1] is not None and sources[1].model is not None:
        raise ValueError(f"nfe={nfe}: the generated images are made meanwhile, and their network calls are counted")
    chosen = possible_metrics(metrics, *(known_fields(source, extractor) for source in sources), sources=sources)
    for metric in chosen:
        metric.check(*sources)
    if n is not None and any(metric.paired for metric in chosen):
        raise ValueError(f"n={n}: the sides are drawn apart, but a metric pairs image i with image i; accepted is None")
    if output is not None:
        refuse_other(output, _known_settings(sources, extractor, chosen, made_with, seed))
    keeps = [
        any("features" in reads for reads in needs)
        for needs in ([m.reads_reference for m in chosen], [m.reads_generated for m in chosen])
    ]
    real, fake = (
        # Few rows are kept in any case: the Frechet distance has a better way with them.
        measure(
            source,
            extractor,
            keep=keep or source.n < extractor.dim or output is not None or intervals is not None,
            batch_size=batch_size,
            device=device,
            strict=strict,
            quiet=quiet,
        )
        if isinstance(source, ImageSet)
        else source
        for source, keep in zip(sources, keeps, strict=True)
    )
    assert fake is not None
    values: dict[str, float] = {}
    notes = _notes(real, fake)
    scores: dict[str, Tensor] = {}
    for metric in chosen:
        if isinstance(metric, PerImage):
            every = metric.every(real, fake)
            scores |= every
            new = metric.summary(every)
        else:
            with _noted():
                new = metric(real, fake)
        notes += metric.beware(real, fake)
        if both := values.keys() & new:
            raise ValueError(f"metrics: {metric.name!r} and another one both give {sorted(both)}")
        values |= new
    protocol = Protocol(
        extractor=extractor.id,
        reference=None if real is None else str(real.stats.meta.get("source", "statistics")),
        generated=str(fake.stats.meta.get("source", "statistics")),
        n_real=None if real is None else real.stats.n,
        n_gen=fake.stats.n,
        metrics={metric.name: metric.settings for metric in chosen},
        reference_images=None if real is None else real.stats.meta.get("images"),
        generated_images=fake.stats.meta.get("images"),
        matched=_matched(real, fake),
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
    with _noted():
        found, without = _intervals(chosen, real, fake, intervals, seed)
    model = fake.model
    result = Result(
        values=values,
        nfe=nfe if model is None else model.network_calls(),
        head_calls=None if model is None else model.head_calls(),
        protocol=protocol,
        notes=notes + without,
        made_with={**({} if model is None else model.made_with), **(made_with or {})},
        intervals=found,
        command=command,
    )
    return result if output is None else save_evaluation(output, result, real, fake, scores)


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    """Within, what the notes of a result say is not warned of as well."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*rank deficient")
        yield


def _intervals(
    metrics: Sequence[Metric], real: FeatureSet | None, fake: FeatureSet, halves: int | None, seed: int
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """By value, and notes on metrics that have none."""
    from genkit.eval.intervals import intervals

    found: dict[str, tuple[float, float]] = {}
    notes = []
    for metric in metrics if halves is not None else ():
        try:
            made = intervals(metric, real, fake, halves=halves or 0, seed=seed)
            found |= {name: (interval.low, interval.high) for name, interval in made.items()}
        except ValueError as error:  # the value itself is there, and halves are too small for what it needs
            notes.append(f"no interval of {metric.name!r}: {error}")
    return found, notes


def _known_settings(
    sources: Sequence[ImageSet | FeatureSet | None],
    extractor: Extractor,
    metrics: Sequence[Metric],
    made_with: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """What of the protocol is known before anything is measured: all but how many images can be read."""
    about = {}
    for role, source in zip(("reference", "generated"), sources, strict=True):
        meta = source.stats.meta if isinstance(source, FeatureSet) else {}
        if isinstance(source, ImageSet):
            meta = {"source": source.name, "images": source.kind}
        about[role] = None if source is None else str(meta.get("source", "statistics"))
        about[f"{role}_images"] = meta.get("images")
    model = None if sources[1] is None else sources[1].model
    return {
        "extractor": extractor.id,
        **about,
        "metrics": {metric.name: metric.settings for metric in metrics},
        "seed": seed,
        "made_with": {**({} if model is None else model.made_with), **(made_with or {})},
    }


def _matched(real: FeatureSet | None, fake: FeatureSet) -> Literal["labels", "prompts", "images"] | None:
    """Whether both sides have each label, or each prompt, equally often, or one is of the very images of the other."""
    if real is None or real.n != fake.n:
        return None
    if fake.model is not None and fake.model.originals is not None:
        return "images" if real.images is not None and same_images(real.images, fake.model.originals) else None
    if real.labels is not None and fake.labels is not None:
        if torch.equal(real.labels.sort().values, fake.labels.sort().values):
            return "labels"
    if real.prompts is not None and fake.prompts is not None and sorted(real.prompts) == sorted(fake.prompts):
        return "prompts"
    return None


def _notes(real: FeatureSet | None, fake: FeatureSet) -> list[str]:
    notes = []
    for role, side in (("reference", real), ("generated", fake)):
        if side is None:
            continue
        notes += side.stats.meta.get("notes", ())
        if side.stats.n is None:
            notes.append(f"the {role} statistics do not say how many images they are of")
        if "extractor" not in side.stats.meta:
            notes.append(f"the {role} statistics do not say which extractor they were made with")
    if fake.model is not None and fake.model.originals is not None:
        which = "is" if _matched(real, fake) == "images" else "is not"
        notes.append(f"the reference {which} the images that were reconstructed, {fake.model.originals.name}")
    kinds = [kind for side in (real, fake) if side is not None and (kind := side.stats.meta.get("images"))]
    if len(kinds) == 2:
        for lossy in ("JPEG", "WEBP"):
            if (lossy in kinds[0]) != (lossy in kinds[1]):
                notes.append(f"{lossy} on one side only ({kinds[0]}; {kinds[1]}): its traces count as a difference")
    return notes
