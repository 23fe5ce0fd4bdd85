"""A student's samples as a set of images to evaluate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.eval.asked import Asked
from genkit.eval.inputs import ImageSet, Maker, to_uint8, uint8_kind
from genkit.eval.on_demand import Spool, evaluating
from genkit.eval.processes import per_image
from genkit.rng import ItemRNG, hash_seed
from genkit.step_annealing import StepAnnealer, as_written
from genkit.training.build import Run
from genkit.training.objectives.base import Objective
from genkit.training.samples import check_steps, draw
from genkit.training.sections import Sampling


def student_images(
    run: Run,
    asked: Asked,
    num_inference_steps: int | StepAnnealer | None = None,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    name: str,
) -> ImageSet:
    """Images of the student of ``run`` with the weights that it has now, made when they are asked for.

    Sampled as in training: by the scheduler and under the guidance that the method names. Image ``i`` is a function of
    the weights and of ``(seed, i)``.

    Args:
        asked: labels or prompts, whichever of the two the student takes.
        num_inference_steps: by default those of the recipe's samples.
        device: where the student is.

    Raises:
        ValueError: a method whose student makes pictures of pictures, steps that the student cannot take, or nothing of
            what it is conditioned on.
    """
    model = _StudentModel(run, asked, num_inference_steps, seed, device, name)
    spool = Spool(model.make, asked.n, model.image_shape, batch_size)
    return ImageSet(name, asked.n, spool.load, asked.labels, asked.prompts, uint8_kind(model.image_shape), model=model)


class _StudentModel(Maker):
    def __init__(
        self, run: Run, asked: Asked, steps: int | StepAnnealer | None, seed: int, device: torch.device, name: str
    ):
        if type(run.objective).restored is not Objective.restored:
            raise ValueError(f"objective={run.config.objective.name!r}: its student makes pictures of pictures")
        if steps is None:
            steps = run.config.sampling.num_inference_steps
        else:
            check_steps(run, Sampling(num_inference_steps=steps), "steps")
        if run.inputs.sample_shape is None:
            raise ValueError("the shape of the model's samples is not known; set data.sample_shape")
        self.shape, self.told = run.inputs.sample_shape, _told(run, asked)
        self.run, self.steps, self.device = run, steps, device
        self.seed = hash_seed(seed, *b"student images")
        self.made_with: dict[str, Any] = {"model": name, "steps": as_written(steps), "seed": seed}
        self._calls, self._images = 0, 0
        self._head_calls = None if self._of_head is None else 0
        with evaluating([run.student.module]):
            pixels = run.inputs.decode(torch.zeros(1, *self.shape, device=device))
        c, h, w = pixels.shape[1:]
        self.image_shape = (c, h, w)

    @property
    def _of_head(self) -> int | None:
        """Calls of the student's diffusion head, since it was made; only some networks have one."""
        return getattr(self.run.student, "head_calls", None)

    def network_calls(self) -> float | None:
        return per_image(self._calls, self._images)

    def head_calls(self) -> float | None:
        return None if self._head_calls is None else per_image(self._head_calls, self._images)

    def make(self, items: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        before, of_head = self.run.student.calls, self._of_head
        read = {k: v[list(items)] if isinstance(v, Tensor) else [v[i] for i in items] for k, v in self.told.items()}
        with evaluating([self.run.student.module]):
            rng = ItemRNG(self.seed, items, self.device)
            pixels = self.run.inputs.decode(draw(self.run, read, rng, self.steps, self.shape)).float().cpu()
        self._calls += (self.run.student.calls - before) * len(items)
        if self._head_calls is not None:
            self._head_calls += (self._of_head - of_head) * len(items)  # type: ignore[operator]
        self._images += len(items)
        bad = (~pixels.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        return to_uint8(pixels.nan_to_num()), {row: f"image {items[row]} is not finite" for row in bad}


def _told(run: Run, asked: Asked) -> dict[str, Any]:
    """What the student is told of each item: labels, prompts or nothing."""
    if run.inputs.labels:
        if asked.labels is None:
            raise ValueError(f"the student takes class labels, and {asked.of} has none")
        low, high = int(asked.labels.min()), int(asked.labels.max())
        if low < 0 or high >= run.inputs.labels:
            raise ValueError(f"{asked.of} has labels {low} to {high}; accepted are 0 to {run.inputs.labels - 1}")
        return {"class_labels": asked.labels.cpu()}
    if run.inputs.prompts:
        if asked.prompts is None:
            raise ValueError(f"the student takes prompts, and {asked.of} has none")
        return {"prompts": list(asked.prompts)}
    return {}
