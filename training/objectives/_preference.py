"""What methods on preferences share: the errors of student and reference at the same noisy samples."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser
from genkit.training.objectives.base import Batch, Objective, ObjectiveConfig, Role
from genkit.training.parts.losses import mean_of_squares, wide
from genkit.training.parts.preferences import Watch, default_times
from genkit.training.parts.reference import Reference
from genkit.training.parts.times import TimeLaw

MaxRise = Field(
    0.5,
    gt=0,
    description="training stops where the error of preferred samples exceeds the reference's by more than this share",
)


class PreferenceConfig(ObjectiveConfig):
    """Settings of every such method.

    ``times``: law of the times; unset is the published one, logit-normal with mean 1 and deviation 1 on the linear path
    and uniform on others. ``error``: what the squared error is taken of; unset is what the network predicts.
    """

    times: TimeLaw | None = None
    error: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] | None = None


class PreferenceObjective(Objective):
    """Errors ``err = |target - prediction|^2 / D`` of the student, and of a reference at the same ``x_t``.

    The reference is the teacher if the run has one, else the student as it was at the start: a frozen copy, or under
    LoRA the network without its adapter.

    Raises:
        ValueError: a teacher that nothing is compared with.
    """

    Config: ClassVar[type[PreferenceConfig]] = PreferenceConfig
    needs_teacher = "optional"

    def __init__(self, config, student: Denoiser, teacher: Denoiser | None = None):
        super().__init__(config, student, teacher)
        if teacher is not None and not self.needs_reference:
            raise ValueError(
                "teacher is the reference of objective=dro, and with these settings of objective.form there is none; "
                "leave teacher out, or use a form that has a reference"
            )
        self.times = config.times or default_times(student.interpolant)
        self.reference = Reference(student, decay=1.0) if self.needs_reference and teacher is None else None
        self.watch = Watch()

    @property
    def needs_reference(self) -> bool:
        """Whether the settings compare the student with anything."""
        return True

    @property
    def roles(self) -> Mapping[str, Role]:
        return {**super().roles, **({} if self.reference is None else self.reference.roles)}

    @contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The reference, for use within; no gradients."""
        if self.reference is None:
            with torch.no_grad():
                yield self.teacher
        else:
            with self.reference.network() as reference:
                yield reference

    def errors(self, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Errors of the student and, where there is one, of the reference, ``(B,)``, at one and the same ``x_t``."""
        path, kind = self.student.interpolant, self.config.error or self.student.prediction_type
        x, target = path.interpolate(x0, eps, t), path.target(kind, x0, eps, t)

        def error(denoiser: Denoiser) -> Tensor:
            return mean_of_squares(wide(denoiser(x, t, condition).as_type(kind)) - target)

        before = None
        if self.needs_reference:
            with self.as_reference() as reference:
                before = error(reference)
        return error(self.student), before

    def rejected(self, batch: Batch) -> Tensor:
        """The rejected sample beside each of ``batch``.

        Raises:
            ValueError: none there, or of another shape.
        """
        lose = batch.fields.get("lose")
        if lose is None:
            raise ValueError(
                f"data gives {sorted(batch.fields)}, not the field 'lose' with a rejected sample beside each x0; set "
                "data.name=preferences"
            )
        if lose.shape != batch.x0.shape:
            raise ValueError(
                f"rejected samples have shape {tuple(lose.shape[1:])}, preferred ones {tuple(batch.x0.shape[1:])}"
            )
        return lose.to(batch.x0)


def twice(condition: Condition) -> Condition:
    """The condition of a batch, for two samples an item: all preferred ones, then all rejected ones."""
    return Condition.cat([condition, condition]) if condition.values else condition


def pair_signs(like: Tensor) -> Tensor:
    """1 for the preferred samples and -1 for the rejected ones of such a batch, of the shape ``(2B,)`` of ``like``."""
    return like.new_tensor([1.0, -1.0]).repeat_interleave(len(like) // 2)
