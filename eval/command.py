"""What ``genkit eval run`` and ``genkit eval features`` do."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from genkit._diffusers import without_loading_bars
from genkit.eval.directions import is_shown
from genkit.eval.extractors.base import get_extractor
from genkit.eval.feature_files import SUFFIX, save_features
from genkit.eval.inputs import ImageSet, UnreadableImage, read_images
from genkit.eval.preparation import Crop
from genkit.eval.processes import join, rank_and_count, wait
from genkit.eval.result import Result
from genkit.eval.run import evaluate, measure
from genkit.eval.sampled import sampled_with
from genkit.eval.sides import Generation, open_sides


def main(
    reference: str,
    generated: str,
    *,
    metrics: Sequence[str] | None = None,
    extractor: str = "digits",
    n: int | None = None,
    nfe: float | None = None,
    size: int | None = None,
    crop: Crop | None = None,
    generation: Generation | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str | None = None,
    strict: bool = False,
    intervals: int | None = None,
    output: str | Path | None = None,
    json_path: str | Path | None = None,
    html_path: str | Path | None = None,
    command: str | None = None,
    quiet: bool = False,
) -> Result:
    """``genkit eval run REFERENCE GENERATED``: evaluate, print a table unless ``quiet``, write the files asked for.

    Arguments and errors are those of ``evaluate`` and ``open_sides``; an output folder that does not exist is refused
    before work starts. Processes that were launched together share the work, and the first of them prints and writes.
    """
    for path in (json_path, html_path):
        _check_folder(path)
    where = join(device)
    with without_loading_bars() if quiet else nullcontext():
        real, fake, drawn = open_sides(
            reference,
            generated,
            n=n,
            size=size,
            crop=crop,
            generation=generation,
            seed=seed,
            batch_size=batch_size,
            device=where,
            strict=strict,
        )
    result = evaluate(
        real,
        fake,
        metrics=metrics,
        extractor=extractor,
        n=drawn,
        nfe=nfe,
        seed=seed,
        batch_size=batch_size,
        device=where,
        strict=strict,
        intervals=intervals,
        made_with=sampled_with(generated),
        command=command,
        output=output,
        quiet=quiet,
    )
    if rank_and_count()[0] > 0:
        return result
    if json_path is not None:
        result.save(json_path)
    if html_path is not None:
        _write_html(html_path, result, real, fake)
    if not quiet:
        _print(result)
    return result


def measure_features(
    images: str,
    output: str | Path,
    *,
    extractor: str = "digits",
    size: int | None = None,
    crop: Crop | None = None,
    batch_size: int = 256,
    device: str | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> None:
    """``genkit eval features IMAGES OUTPUT``: measure a set once, for ``run`` and ``sweep`` to take as a reference.

    Raises:
        ValueError: an output without ``.safetensors`` or in no folder, and whatever ``read_images`` refuses.
    """
    if Path(output).suffix != SUFFIX:
        raise ValueError(f"{output}: features are saved with the suffix {SUFFIX}")
    _check_folder(output)
    where = join(device)
    images_read = read_images(images, size=size, crop=crop, strict=strict)
    found = measure(
        images_read, get_extractor(extractor), batch_size=batch_size, device=where, strict=strict, quiet=quiet
    )
    if rank_and_count()[0] == 0:
        save_features(output, found)
        if not quiet:
            for note in found.stats.meta["notes"]:
                print(f"note: {note}")
    wait()


def _check_folder(path: str | Path | None) -> None:
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {Path(path).absolute().parent} does not exist")


def _print(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    protocol = result.protocol
    table = Table(title=Text(f"{protocol.generated} against {protocol.reference}"), title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    shown = {value for name, value in result.values.items() if is_shown(name)}
    for name, value in result.values.items():
        if not is_shown(name) and value in shown:  # a detail that says the same
            continue
        low_high = result.intervals.get(name)
        interval = f"  [{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else ""
        table.add_row(Text(name), f"{value:.6g}{interval}")  # as text: fid[clean] has no markup
    if result.nfe is not None:
        table.add_row("network calls (NFE)", f"{result.nfe:g}")
    if result.head_calls is not None:
        table.add_row("calls of the diffusion head", f"{result.head_calls:g}")
    console = Console()
    console.print(table)
    lines = [f"extractor {protocol.extractor}, n_real {protocol.n_real}, n_gen {protocol.n_gen}"]
    for line in lines + [f"note: {note}" for note in result.notes]:
        console.print(line, highlight=False, markup=False)


def _write_html(path: str | Path, result: Result, reference: Any, generated: Any) -> None:
    from genkit.eval.report import Cell, Gallery, ImageGrid, ProtocolBlock, Section, Table, format_number, write_report

    rows: list[tuple[str, Any]] = []
    for name, value in result.values.items():
        between = result.intervals.get(name)
        note = "" if between is None else " – ".join(format_number(end) for end in between)
        rows.append((name, Cell(value, note)))
    if result.nfe is not None:
        rows.append(("network calls (NFE)", result.nfe))
    if result.head_calls is not None:
        rows.append(("calls of the diffusion head", result.head_calls))
    grids = []
    for role, source in (("reference", reference), ("generated", generated)):
        if isinstance(source, ImageSet) and (first := _first(source)):
            grids.append(ImageGrid(torch.cat(first), f"{role}: the first {len(first)} of {source.name}"))
    caption = "Below values are their 95 % intervals." if result.intervals else ""
    sections = [Section("Values", [Table(["metric", "value"], rows, caption), *result.notes])]
    if grids:
        sections.append(Section("Images", [Gallery(grids)]))
    sections.append(Section("Protocol", [ProtocolBlock(result.protocol)]))
    write_report(path, f"{result.protocol.generated} against {result.protocol.reference}", *sections)


def _first(images: ImageSet, count: int = 60) -> list[torch.Tensor]:
    """The first that can be read."""
    found: list[torch.Tensor] = []
    for i in range(images.n):
        if len(found) == count:
            break
        try:
            found.append(images.load(torch.tensor([i])))
        except UnreadableImage:  # counted and named in the notes
            continue
    return found
