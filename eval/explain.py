"""Why two Frechet distances differ: the same images under every resize rule, as JPEG, and in smaller numbers."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from genkit.eval.extractors._resized import ResizedExtractor
from genkit.eval.extractors.base import Extractor, get_extractor
from genkit.eval.inputs import ImageSet, read_images
from genkit.eval.metrics.base import FeatureSet
from genkit.eval.metrics.frechet import FrechetDistance
from genkit.eval.processes import join, rank_and_count
from genkit.eval.resize import RULES
from genkit.eval.run import measure
from genkit.registry import members, unknown
from genkit.rng import hash_seed

QUALITIES = (95, 75)  # JPEG: of careful code, and PIL's default
PARTS = (2, 4)


class Row(BaseModel):
    """A ``choice`` (resize, jpeg, images) made in the way ``name``, the ``value`` of the distance that it gives, and
    its ``difference`` from that of the extractor as it was named, also in ``percent`` of it.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    choice: str
    name: str
    value: float
    difference: float
    percent: float


class Pair(BaseModel):
    """The distance under ``first`` minus that under ``second``, and what of ``X - Y`` it leaves ``unexplained``."""

    model_config = ConfigDict(frozen=True)

    first: str
    second: str
    explained: float
    unexplained: float


class Explanation(BaseModel):
    """``rows``, the first of which is the extractor as it was named; and ``pairs``, the best first, for two values."""

    model_config = ConfigDict(frozen=True)

    extractor: str
    distance: str
    reference: str
    generated: str
    n_real: int
    n_gen: int
    rows: list[Row]
    values: tuple[float, float] | None = None
    pairs: list[Pair] = []
    notes: list[str] = []


def explain(
    reference: Any,
    generated: Any,
    *,
    extractor: str | Extractor = "inception",
    rules: Sequence[str] = tuple(RULES),
    values: tuple[float, float] | None = None,
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> Explanation:
    """The Frechet distance of two sets of images under each choice that published numbers differ in.

    Rows are: each of ``rules`` on both sides (``pil`` against ``clean`` is what rounding to eight bits does); the
    generated images saved as JPEG; and halves and quarters of both sets, the mean over all of them, which shows the
    bias of few images.

    Args:
        reference, generated: images as :func:`genkit.eval.inputs.read_images` takes them.
        extractor: one with a setting ``resize``.
        rules: of :mod:`genkit.eval.resize`; that of the extractor is always among them.
        values: two published numbers X, Y. ``pairs`` then has what X - Y could be: pairs that differ in one choice, by
            how little of X - Y they leave. The sets here are not those of the numbers, so a pair is a suspicion.
        n: use only this many images of each side, drawn at random with ``seed``.

    Raises:
        ValueError: an extractor that does not resize, an unknown rule, values that are not finite, too few images.
    """
    made = get_extractor(extractor)
    if not isinstance(made, ResizedExtractor):
        names = [
            k for k, cls in members("genkit.eval.extractors", Extractor).items() if issubclass(cls, ResizedExtractor)
        ]
        raise ValueError(f"extractor={extractor!r} has no setting resize; accepted are {', '.join(names)}")
    for rule in rules:
        if rule not in RULES:
            raise ValueError(unknown("rules", rule, RULES))
    if values is not None and not all(map(math.isfinite, values)):
        raise ValueError(f"values={values}: expected two finite numbers")
    sides = [_drawn(read_images(s), n, seed, role) for s, role in ((reference, "reference"), (generated, "generated"))]
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "quiet": quiet}

    def features(images: ImageSet, by: ResizedExtractor) -> FeatureSet:
        return measure(images, by, keep=by is made or images.n < by.dim, **options)

    real, fake = (features(side, made) for side in sides)
    found = [("resize", made.resize, _distance(real, fake))]
    for rule in dict.fromkeys(rules):
        if rule != made.resize:
            other = made.with_resize(rule)
            found.append(("resize", rule, _distance(*(features(side, other) for side in sides))))
    for quality in QUALITIES:
        found.append(("jpeg", f"quality {quality}", _distance(real, features(_as_jpeg(sides[1], quality), made))))
    n_real, n_gen = real.n or 0, fake.n or 0
    fewest = min(n_real, n_gen)
    for parts in PARTS:
        if fewest >= 2 * parts:
            found.append(("images", f"n / {parts}", _of_parts(real, fake, parts, seed)))
    first = found[0][2]
    rows = [
        Row(choice=choice, name=name, value=value, difference=value - first, percent=_percent(value - first, first))
        for choice, name, value in found
    ]
    notes = [note for side in (real, fake) if side.images for note in side.images.notes]
    if fewest < made.dim:
        notes.append(f"fewer images ({fewest}) than feature dimensions ({made.dim}): the distances are inflated")
    return Explanation(
        extractor=made.id,
        distance=made.distance,
        reference=sides[0].name,
        generated=sides[1].name,
        n_real=n_real,
        n_gen=n_gen,
        rows=rows,
        values=values,
        pairs=[] if values is None else _pairs(rows, values[0] - values[1]),
        notes=notes,
    )


def _drawn(images: ImageSet, n: int | None, seed: int, role: str) -> ImageSet:
    if images.n < (n or 2) or (n is not None and n < 2):
        raise ValueError(f"n={n}: {role} set {images.name!r} has {images.n} images; accepted is 2 to that many")
    if n is None:
        return images
    generator = torch.Generator().manual_seed(hash_seed(seed, *role.encode()))
    return images.subset(torch.randperm(images.n, generator=generator)[:n].sort().values)


def _distance(real: FeatureSet, fake: FeatureSet) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few images, once for all rows among the notes
        values = FrechetDistance()(real, fake)
    return next(value for name, value in values.items() if name != "frechet_raw")


def _of_parts(real: FeatureSet, fake: FeatureSet, parts: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(hash_seed(seed, parts))
    cut = [torch.randperm(side.n or 0, generator=generator).tensor_split(parts) for side in (real, fake)]
    pairs = zip(*cut, strict=True)
    return sum(_distance(real.subset(i), fake.subset(j)) for i, j in pairs) / parts


def _as_jpeg(images: ImageSet, quality: int) -> ImageSet:
    def load(indices: Tensor) -> Tensor:
        return torch.stack([_jpeg(image, quality) for image in images.load(indices)])

    return replace(images, load=load, name=f"{images.name} as JPEG")


def _jpeg(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    pixels = image.permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.atleast_3d(np.array(Image.open(file)))).permute(2, 0, 1)


def _percent(difference: float, whole: float) -> float:
    if difference == 0:
        return 0.0
    return 100 * difference / whole if whole else math.copysign(math.inf, difference)


def _pairs(rows: Sequence[Row], difference: float) -> list[Pair]:
    usual = rows[0]
    pairs = [
        Pair(
            first=_label(a),
            second=_label(b),
            explained=a.value - b.value,
            unexplained=difference - (a.value - b.value),
        )
        for a in rows
        for b in rows
        if a is not b and (a.choice == b.choice == "resize" or usual in (a, b))
    ]
    return sorted(pairs, key=lambda pair: abs(pair.unexplained))


def _label(row: Row) -> str:
    return row.name if row.choice == "resize" else f"{row.choice} {row.name}"


def main(
    a: str,
    b: str,
    *,
    json_path: str | Path | None = None,
    quiet: bool = False,
    values: str | None = None,
    rules: str | None = None,
    **settings: Any,
) -> None:
    """``genkit eval doctor A B``: explain, or compare two results; print it unless ``quiet``, and write JSON.

    Arguments and errors are those of :func:`explain`; what is None is left at its default. Of two results
    (:mod:`genkit.eval.differences`) there is nothing to set. Processes that were launched together share the work.
    """
    from genkit.eval import differences

    if json_path is not None and not Path(json_path).absolute().parent.is_dir():
        raise ValueError(f"{json_path}: the folder {Path(json_path).absolute().parent} does not exist")
    given = {k: v for k, v in {**settings, "values": values, "rules": rules}.items() if v is not None}
    results = [differences.result_file(path) for path in (a, b)]
    found: Explanation | differences.Comparison
    if all(results):
        if given:
            raise ValueError(f"{', '.join(given)}: A and B are results, which are compared as they are")
        found = differences.compare(*(path for path in results if path))
    elif any(results):
        raise ValueError(f"{a} and {b}: one is a result and one is not; accepted are two results or two sets of images")
    else:
        if values is not None:
            given["values"] = _two(values)
        if rules is not None:
            given["rules"] = [rule.strip() for rule in rules.split(",")]
        given["device"] = join(given.get("device"))
        found = explain(a, b, quiet=quiet, **given)
    if rank_and_count()[0] > 0:
        return
    if json_path is not None:
        Path(json_path).write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if not quiet:
        if isinstance(found, Explanation):
            _print(found)
        else:
            differences.show(found)


def _two(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"values={text!r}: expected two numbers X,Y") from error
    return x, y


def _print(found: Explanation) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"{found.distance}: {found.generated} against {found.reference}"
    table = Table(title=Text(title), title_justify="left")  # as text: fid[clean] has no markup
    for name in ("choice", "", "value", "difference", "percent"):
        table.add_column(name, justify="left" if name in ("choice", "") else "right")
    for i, row in enumerate(found.rows):
        changes = ("", "") if i == 0 else (f"{row.difference:+.4g}", f"{row.percent:+.1f}")
        table.add_row(row.choice, row.name, f"{row.value:.6g}", *changes)
    console = Console()
    console.print(table)
    lines = [f"extractor {found.extractor}, n_real {found.n_real}, n_gen {found.n_gen}"]
    if found.values is not None:
        x, y = found.values
        lines.append(f"{x:g} - {y:g} = {x - y:+.4g} could be:")
        lines += [
            f"  {pair.first} against {pair.second}: {pair.explained:+.4g}, unexplained {pair.unexplained:+.4g} "
            f"({abs(_percent(pair.unexplained, x - y)):.0f} %)"
            for pair in found.pairs[:3]
        ]
        lines.append("These sets are not those of the two numbers: take it for a suspicion.")
    for line in [*lines, *(f"note: {note}" for note in found.notes)]:
        console.print(line, highlight=False, markup=False)
