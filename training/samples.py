"""Samples and metrics in the course of a run."""

import json
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from genkit.eval.inputs import to_uint8
from genkit.eval.processes import alone
from genkit.eval.run import evaluate
from genkit.rng import ItemRNG, hash_seed
from genkit.sampling import sample
from genkit.step_annealing import StepAnnealer
from genkit.students import Student
from genkit.training.adapters import base_network
from genkit.training.build import Run
from genkit.training.parts.rollout import schedule
from genkit.training.sections import Evaluation, Rounds, Sampling


def draw(
    run: Run, read: dict[str, Any], rng: ItemRNG, num_inference_steps: int | StepAnnealer, shape: tuple[int, ...]
) -> Tensor:
    """Clean samples ``(B, *shape)`` of the student, float32, in its space, under the guidance that its method names.

    Args:
        num_inference_steps: that :func:`check_steps` has passed.
        read: a batch of a source; its labels or prompts are what samples are drawn under.
        rng: of one row a sample, on the device of the network.
    """
    device = rng.items.device
    own = run.objective.own_condition(run.inputs.asked(read), rng)
    condition = run.inputs.condition(read, device) if own is None else own
    if isinstance(run.student, Student):
        return run.student.draw(rng, condition, num_inference_steps if run.student.takes_steps else None)
    assert isinstance(num_inference_steps, int)
    scheduler = run.objective.scheduler(run.pipe.scheduler)
    schedule(run.student, run.pipe, scheduler, num_inference_steps, shape, device)
    x = rng.normal(shape) * getattr(scheduler, "init_noise_sigma", 1.0)
    guider = run.objective.guider()
    return sample(run.student, scheduler, x, condition, guider=guider, generators=rng.generators()).float()


def check_steps(run: Run, settings: Sampling | Evaluation | Rounds, section: str) -> None:
    """Refuse a number of steps that the student cannot take."""
    steps, student = settings.num_inference_steps, run.student
    told, network = f"{section}.num_inference_steps={steps}", type(base_network(student)).__name__
    if isinstance(student, Student):
        if not student.takes_steps and "num_inference_steps" in settings.model_fields_set:
            raise ValueError(f"{told}: {network} takes none; leave it out")
        if student.takes_steps:
            try:
                student.check(run.pipe.sampling_class(num_inference_steps=steps))  # type: ignore[attr-defined]
            except ValueError as error:
                raise ValueError(f"{section}.{error}") from None
        return
    if isinstance(steps, StepAnnealer):
        raise ValueError(
            f"{told}: steps that fall are those of a diffusion head, which {network} has "
            "not; accepted is a whole number"
        )
    known = run.objective.scheduler(run.pipe.scheduler).config.get("trained_times")
    if known and steps > len(known):
        raise ValueError(f"{told}: the student knows {len(known)} times; accepted are 1 to {len(known)}")


class Sampler:
    """Draws the same samples again and again: noise, labels and prompts are fixed by the settings.

    Raises:
        ValueError: more samples are to be compared with the data than there are.
    """

    def __init__(self, run: Run):
        self.run, self.settings = run, run.config.sampling
        check_steps(run, self.settings, "sampling")
        self.folder = run.config.output_dir / "samples"
        n = self.settings.num_samples
        if self.settings.evaluate is not None and len(run.source) < n:
            raise ValueError(f"sampling.num_samples={n}: the data has {len(run.source)} items to compare them with")
        self.read = run.source.__getitems__(range(n))
        if run.inputs.labels:
            self.read["class_labels"] = torch.arange(n) % run.inputs.labels

    def draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Clean samples ``(num_samples, *shape)``, float32, in the student's space."""
        fields = {k: v.to(device) for k, v in self.read.items() if isinstance(v, Tensor)}
        restored = self.run.objective.restored(fields)
        if restored is not None:
            return restored.float()
        n, seed = self.settings.num_samples, hash_seed(self.run.config.seed, 0x73616D70)
        return draw(self.run, self.read, ItemRNG(seed, range(n), device), self.settings.num_inference_steps, shape)

    def record(self, samples: Tensor, step: int, accelerator: Accelerator, measures: dict[str, float]) -> None:
        """A picture in ``samples/``, a line in ``samples/metrics.jsonl`` with ``measures`` and the evaluation's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pixels = self.run.inputs.decode(samples)
        asked = self.run.inputs.asked(self.read)
        measures = measures | {f"samples/{k}": v for k, v in self.run.objective.measures(pixels, asked).items()}
        if self.settings.evaluate is not None:
            real = self.run.inputs.pixels(self.run.source.__getitems__(range(len(pixels)))["x0"])
            labels = self.read["class_labels"] if "class_labels" in self.read else None
            generated = to_uint8(pixels.cpu())
            with alone():  # the other processes go on
                result = evaluate(
                    to_uint8(real),
                    generated if labels is None else (generated, labels),
                    extractor=self.settings.evaluate,
                    device=samples.device,
                    quiet=True,
                )
            measures = measures | {f"eval/{k}": v for k, v in result.values.items()}
        if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
            grid = image_grid(pixels)
            grid.save(self.folder / f"step-{step}.png")
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images({"samples": numpy.asarray(grid.convert("RGB"))[None]}, step, dataformats="NHWC")
                elif hasattr(tracker, "log_images"):
                    tracker.log_images({"samples": [grid]}, step)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **measures}) + "\n")
        accelerator.log(measures, step=step)


def image_grid(pixels: Tensor, least: int = 64) -> Image.Image:
    """``(B, C, H, W)`` in [-1, 1] as one picture, near square, small pictures enlarged to a side of ``least``."""
    arrays = to_uint8(pixels.float().cpu()).permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]
    columns = max(c for c in range(1, len(images) + 1) if len(images) % c == 0 and c * c <= len(images))
    factor = max(1, least // images[0].width)
    images = [i.resize((i.width * factor, i.height * factor), Image.Resampling.NEAREST) for i in images]
    return make_image_grid(images, rows=columns, cols=len(images) // columns)
