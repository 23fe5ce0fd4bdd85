"""Metrics of a student's samples in the course of its run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from genkit.eval.extractors.base import get_extractor
from genkit.eval.inputs import ImageSet, read_images, to_uint8
from genkit.eval.metrics.base import FeatureSet, get_metric
from genkit.eval.processes import gather
from genkit.eval.result import Result
from genkit.eval.run import evaluate, measure
from genkit.eval.statistics import FeatureStats, is_statistics
from genkit.rng import ItemRNG, hash_seed
from genkit.step_annealing import as_written
from genkit.students import Student
from genkit.training.build import Run
from genkit.training.fakes import spread
from genkit.training.objectives.base import DivergedError
from genkit.training.samples import check_steps, draw

FOLDER = "evaluations"


class Evaluator:
    """``evaluator(step, ...)``: metrics of ``num_samples`` samples, the same noise and conditions each time.

    Sample ``i`` is a function of the weights and of ``(seed, i)``, under the condition of record ``i`` of as many that
    are evenly spread over the data, so that both sides have the same labels. All processes call it, and each draws its
    share. Each result is a file in ``evaluations``, whole, with its protocol: what ``genkit eval`` reads.

    Raises:
        ValueError: settings that do not fit the run, an extractor or a metric that is not known.
        FileNotFoundError: no such reference.
    """

    def __init__(self, run: Run):
        self.run, self.settings = run, run.config.evaluation
        check_steps(run, self.settings, "evaluation")
        assert self.settings.extractor is not None
        self.extractor = get_extractor(self.settings.extractor)
        self.metrics = None if self.settings.metrics is None else [get_metric(m) for m in self.settings.metrics]
        n, source = self.settings.num_samples, run.source
        if self.settings.reference is None and source.length is not None and source.length < n:
            raise ValueError(
                f"evaluation.num_samples={n}: the data has {source.length} items to compare them with; accepted are as "
                "many, or another evaluation.reference"
            )
        self.records = spread(source, n)
        self.reference: FeatureSet | None = None
        self._bad = False

    def __call__(
        self,
        step: int,
        shape: tuple[int, ...],
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        accelerator: Accelerator,
    ) -> Result:
        """Evaluate the student as it is, write the result and log its values.

        Args:
            shape: of a sample in the student's space.
            autocast: what samples are drawn in.

        Raises:
            DivergedError: on every process, if a sample is not finite.
        """
        settings, made_with = self.settings, {"model": self.run.config.output_dir.name, "training_step": step}
        if not isinstance(self.run.student, Student) or self.run.student.takes_steps:
            made_with["steps"] = as_written(settings.num_inference_steps)
        if self.reference is None:
            self.reference = self._reference(device)
        self._bad = False

        def load(indices: Tensor) -> Tensor:
            with autocast():
                return self._drawn(indices, shape, device)

        result = evaluate(
            self.reference,
            ImageSet("samples", settings.num_samples, load, *self._asked),
            metrics=self.metrics,
            extractor=self.extractor,
            batch_size=settings.batch_size,
            device=device,
            made_with=made_with,
            quiet=True,
        )
        if any(gather(self._bad)):
            raise DivergedError(f"step {step}: samples hold NaN or infinite values")
        if accelerator.is_main_process:
            folder = self.run.config.output_dir / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            result.save(folder / f"step-{step}.json")
        accelerator.log({f"eval/{name}": value for name, value in result.values.items()}, step=step)
        return result

    def _drawn(self, indices: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
        read = self.run.source.__getitems__(self.records[indices])
        samples = self.run.objective.restored({k: v.to(device) for k, v in read.items() if isinstance(v, Tensor)})
        if samples is None:
            rng = ItemRNG(hash_seed(self.run.config.seed, *b"evaluation"), indices, device)
            samples = draw(self.run, read, rng, self.settings.num_inference_steps, shape)
        pixels = self.run.inputs.decode(samples.float())
        self._bad |= not bool(pixels.isfinite().all())  # told to all processes at the end, which one must not leave
        return to_uint8(pixels.nan_to_num()).cpu()

    def _reference(self, device: torch.device) -> FeatureSet:
        """Measured once; and what the student is asked for by the records, read once."""
        asked = [self._read(items) for items in torch.arange(len(self.records)).split(self.settings.batch_size)]
        labels = [read["class_labels"] for read in asked] if self.run.inputs.labels else []
        prompts = [text for read in asked for text in read["prompts"]] if self.run.inputs.prompts else []
        self._asked = (torch.cat(labels) if labels else None, prompts or None)
        given = self.settings.reference
        if given is not None and Path(given).is_file() and is_statistics(given):
            stats = FeatureStats.load(given)
            stats.meta.setdefault("source", Path(given).name)
            return FeatureSet(stats)
        if given is not None:
            images = read_images(given)
        else:

            def load(indices: Tensor) -> Tensor:
                x0 = self._read(indices)["x0"].to(device)
                return to_uint8(self.run.inputs.pixels(x0)).cpu()

            images = ImageSet(self.run.config.data.name, len(self.records), load, *self._asked)
        return measure(images, self.extractor, batch_size=self.settings.batch_size, device=device, quiet=True)

    def _read(self, items: Tensor) -> dict[str, Any]:
        return self.run.source.__getitems__(self.records[items])
