"""``genkit eval sweep``: evaluate a model at every combination of steps, guidance, and what else it is sampled by."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from genkit._diffusers import without_loading_bars
from genkit.adapters import parse_adapter
from genkit.eval.asked import Asked, evenly, matched
from genkit.eval.cells import Cell, cells
from genkit.eval.extractors.base import get_extractor
from genkit.eval.feature_files import is_features
from genkit.eval.generated import generated_images
from genkit.eval.inputs import ImageSet, read_images
from genkit.eval.metrics.base import FeatureSet, Metric
from genkit.eval.preparation import Crop
from genkit.eval.processes import join, rank_and_count
from genkit.eval.run import NoImages, evaluate, known_fields, open_set, possible_metrics
from genkit.eval.runs import telling
from genkit.eval.statistics import FeatureStats, is_statistics
from genkit.eval.sweep_folder import SweepFolder, model_identity, reference_identity, write
from genkit.eval.sweep_progress import Progress
from genkit.eval.sweep_table import check_table, show_table, table
from genkit.pipelines.base import DenoiserPipeline
from genkit.pipelines.by_name import parse_settings
from genkit.pipelines.commands import DTYPES, load_any
from genkit.pipelines.numbered import num_classes
from genkit.registry import unknown
from genkit.step_annealing import StepAnnealer


class Sweep:
    """A model, a reference and settings that every cell has in common; :meth:`run` makes the cells that are not there.

    Args:
        model: a pipeline's folder or its name on the Hub; see ``load_any``.
        reference: what ``evaluate`` takes. Images are generated for its prompts or labels, each as often as there; for
            the classes of the model in turn where it has neither.
        output: the folder: new, empty, or of a sweep with the same settings, which then goes on.
        n: use only this many images of the reference, drawn by ``seed``, and generate as many.
        adapters, arguments, dtype: as ``genkit sample`` has them.
        size, crop: what is done to images on both sides; see ``read_images``.
        metrics, extractor, intervals, strict, device: as ``evaluate`` has them.
        batch_size: images that are generated, and measured, together.

    Raises:
        ValueError, FileNotFoundError: whatever can be refused before the network is called.
    """

    def __init__(
        self,
        model: str | Path,
        reference: Any,
        output: str | Path,
        *,
        metrics: Sequence[str | Metric] | None = None,
        extractor: str = "digits",
        n: int | None = None,
        seed: int = 0,
        adapters: Sequence[str] = (),
        arguments: str = "",
        dtype: str = "float32",
        size: int | None = None,
        crop: Crop | None = None,
        intervals: int | None = None,
        strict: bool = False,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        quiet: bool = False,
    ):
        for name, value, least in (("n", n, 2), ("intervals", intervals, 2), ("batch_size", batch_size, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if dtype not in DTYPES:
            raise ValueError(unknown("dtype", dtype, DTYPES))
        self.arguments = parse_settings("arguments", arguments)
        if "guidance_scale" in self.arguments:
            raise ValueError("arguments: guidance_scale is an axis of the sweep; give it as guidance")
        loras = [parse_adapter(text) for text in adapters]
        self.extractor, self.seed, self.device = get_extractor(extractor), seed, device
        if size is not None and not _is_measured(reference):
            reference = read_images(reference, size=size, crop=crop, strict=strict)
        self.real = open_set(reference, "reference", self.extractor, n, seed, strict)
        self.output, self.metrics = Path(output), metrics
        self.strict, self.intervals, self.batch_size, self.quiet = strict, intervals, batch_size, quiet
        self.prepare: dict[str, Any] = {"size": size, "crop": crop}
        path = Path(model)
        self.name = path.parent.name if path.name == "pipeline" and path.parent.name else path.name
        self.pipe: Any = load_any(model, dtype=DTYPES[dtype])
        if loras and not isinstance(self.pipe, DenoiserPipeline):
            raise ValueError(f"adapters={list(adapters)}: {type(self.pipe).__name__} takes none")
        for i, (lora, scale) in enumerate(loras):
            self.pipe.load_adapter(lora, f"adapter_{i}", scale)
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.asked = _asked(self.pipe, self.real, n)
        self.settings = {
            "model": self.name,
            "weights": model_identity(model),
            "adapters": [[model_identity(lora), scale] for lora, scale in loras],
            "arguments": self.arguments,
            "dtype": dtype,
            "reference": reference_identity(self.real),
            "n": self.asked.n,
            "seed": seed,
            **self.prepare,
            "extractor": self.extractor.id,
            "intervals": intervals,
        }

    def run(
        self,
        *,
        steps: Sequence[int | StepAnnealer] = (),
        guidance: Sequence[float] = (1.0,),
        guiders: Sequence[str] = (),
        schedulers: Sequence[str] = (),
        over: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[SweepFolder, dict[str, str]]:
        """Evaluate every combination of the axes (see :func:`genkit.eval.cells.cells`) that is not in the folder yet.

        A cell is there once its ``result.json`` is, which is written last and in one move, so a sweep that was killed
        goes on, and one with more values extends it. Of processes that were launched together each takes its share of
        a cell's images. Returns the folder, and by name why cells have no result: hardly an image could be used.
        """
        axes: dict[str, Any] = {"steps": steps, "guidance": guidance, "guiders": guiders, "schedulers": schedulers}
        wanted = cells(self.pipe, **axes, over=over, arguments=self.arguments)
        fields = known_fields(self._check(wanted), self.extractor)
        metrics = possible_metrics(self.metrics, known_fields(self.real, self.extractor), fields)
        for metric in metrics:
            if metric.paired:
                raise ValueError(f"metrics: {metric.name!r} pairs image i with image i; here none is made from another")
        chosen = {metric.name: metric.settings for metric in metrics}
        folder = SweepFolder(self.output, {**self.settings, "metrics": chosen})
        missing = [cell for cell in wanted if not folder.is_done(cell.name)]
        common: dict[str, Any] = {"batch_size": self.batch_size, "device": self.device, "strict": self.strict}
        real = self.real
        if isinstance(real, ImageSet) and missing:
            real = folder.reference(real, self.extractor, **common, quiet=self.quiet)
        failed: dict[str, str] = {}
        progress = Progress(wanted, missing, self.asked.n, self.batch_size, self.quiet)
        for cell in missing:
            where = folder.begin(cell.name)
            try:
                evaluate(
                    real,
                    progress.of(cell, self._generated(cell, where)),
                    metrics=metrics,
                    extractor=self.extractor,
                    seed=self.seed,
                    intervals=self.intervals,
                    made_with={"model": self.name, **self.arguments, **cell.made_with, "seed": self.seed},
                    output=where,
                    quiet=True,
                    **common,
                )
            except NoImages as error:
                failed[cell.name] = str(error)
        progress.close()
        return folder, failed

    def _check(self, wanted: Sequence[Cell]) -> ImageSet:
        """Refuse what a cell would be refused for; returns the images of one, not made yet."""
        room = self.output.absolute()
        while not room.is_dir():
            room = room.parent
        for cell in wanted:
            images = self._generated(cell, room)
            if cell.scheduler is not None:
                self.pipe._set_schedule(self.pipe.sample_shape(**self._sizes), cell.steps, self.device, None, None)
        return images

    @property
    def _sizes(self) -> dict[str, Any]:
        return {name: self.arguments[name] for name in ("height", "width") if name in self.arguments}

    def _generated(self, cell: Cell, folder: Path) -> ImageSet:
        if cell.scheduler is not None:
            self.pipe.register_modules(scheduler=cell.scheduler)
        return generated_images(
            self.pipe,
            self.asked,
            seed=self.seed,
            num_inference_steps=cell.steps,
            guider=cell.guider,
            arguments={**self.arguments, **cell.told},
            batch_size=self.batch_size,
            name=self.name,
            folder=folder,
            **self.prepare,
        )


def _asked(pipe: Any, real: ImageSet | FeatureSet, n: int | None) -> Asked:
    if isinstance(real, FeatureSet):
        count = n if real.n is None else real.n
        if count is None:
            raise ValueError("n=None: the reference statistics do not say how many images they are of; give n")
        name = str(real.stats.meta.get("source", "statistics"))
        real = ImageSet(name, count, lambda indices: torch.empty(0), real.labels, real.prompts)
    if real.labels is None and real.prompts is None and (classes := _classes(pipe)) > 0:
        return evenly(classes, real.n)
    return matched(real)


def _classes(pipe: Any) -> int:
    """Of a network that takes labels; 0 of others."""
    if not isinstance(pipe, DenoiserPipeline):
        return pipe.student_class.of_pipeline(pipe).num_classes
    return num_classes(pipe.network) if pipe.classic is None else 0


def _is_measured(source: Any) -> bool:
    if not isinstance(source, str | Path):
        return isinstance(source, FeatureSet | FeatureStats)
    return is_features(source) or Path(source).is_file() and is_statistics(source)


def main(
    model: str,
    reference: str,
    output: Path,
    *,
    steps: str | None = None,
    guidance: str = "1",
    guider: str | None = None,
    scheduler: str | None = None,
    over: str = "",
    mmhm: str | None = None,
    json_path: Path | None = None,
    csv_path: Path | None = None,
    html_path: Path | None = None,
    force: bool = False,
    device: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """The command: make the cells, then write ``results.json`` and ``results.csv``, print, and return the table.

    Raises:
        ValueError, FileNotFoundError: as :class:`Sweep`; at the end, where a cell has no result.
    """
    from genkit.eval.by_name import several_steps, split

    written = {"json": json_path, "csv": csv_path, "html": html_path}
    for name, path in written.items():
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{name}={str(path)!r}: the folder {path.absolute().parent} does not exist")
    axes: dict[str, Any] = {
        "steps": [] if steps is None else several_steps(steps),
        "guidance": [_scale(text) for text in guidance.split(",")],
        "guiders": [] if guider is None else split(guider),
        "schedulers": [] if scheduler is None else split(scheduler),
        "over": _over(over),
    }
    check_table(mmhm)
    where = join(device)
    with without_loading_bars():
        asked = Sweep(model, reference, output, device=where, quiet=quiet, **settings)
    folder, failed = asked.run(**axes)
    results = folder.results()
    found = table(results, mmhm=mmhm, force=force)
    if rank_and_count()[0] == 0:
        write(folder.folder / "results.json", json.dumps(found, indent=2) + "\n")
        axes_there = telling([result.made_with for result in results.values()])
        show_table(found, folder.folder, written, told=axes_there, force=force, mmhm=mmhm, quiet=quiet)
    if failed:
        told = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise ValueError(f"{len(failed)} cells have no result, and will be tried again: {told}")
    return found


def _over(text: str) -> dict[str, Sequence[Any]]:
    axes = parse_settings("over", text)
    for name, values in axes.items():
        if not isinstance(values, list | tuple):
            raise ValueError(
                f"over: {name}={values!r}: expected a list, as {name}=[{values!r}]; one value goes into --set"
            )
    return axes


def _scale(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"guidance={text.strip()!r}: expected numbers, separated by commas") from None
