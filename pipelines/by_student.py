"""Images by number from networks that make them in their own way, such as token after token (``genkit.students``)."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from diffusers import DiffusionPipeline

from genkit.pipelines.base import PipelineOutput
from genkit.pipelines.numbered import refuse_steps_of
from genkit.registry import members, unknown
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer

# What is decided elsewhere, in ways that make an image a function of the seed and its number.
_DECIDED = {"self", "class_labels", "num_inference_steps", "num_images_per_label", "generator", "output_type"}
_DECIDED |= {"return_dict"}


def student_pipelines() -> dict[str, Any]:
    """The pipelines of such networks, by the names of their classes."""
    known: Any = members("genkit.pipelines", DiffusionPipeline).values()
    return {cls.__name__: cls for cls in known if hasattr(cls, "student_class")}


def draws_by_labels(cls: Any) -> bool:
    """Whether a pipeline is one of those, and is asked for labels."""
    return hasattr(cls, "student_class") and "class_labels" in inspect.signature(cls.__call__).parameters


def arguments_of(pipe: Any, num_inference_steps: int | StepAnnealer | None, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a call of ``pipe``, with its steps, where it takes any.

    Raises:
        ValueError: a setting that it does not take, or a value out of range.
    """
    call = inspect.signature(type(pipe).__call__).parameters
    arguments = dict(extra)
    refuse_steps_of(arguments)
    for name in arguments:
        if name not in call.keys() - _DECIDED:
            raise ValueError(unknown("arguments: setting", name, call.keys() - _DECIDED))
    if "num_inference_steps" in call:
        default = call["num_inference_steps"].default
        arguments["num_inference_steps"] = default if num_inference_steps is None else num_inference_steps
    elif num_inference_steps is not None:
        raise ValueError(
            f"num_inference_steps={num_inference_steps}: a pipeline of the class {type(pipe).__name__} takes none"
        )
    pipe.student_class.of_pipeline(pipe).check(sampling_of(pipe, arguments))
    return arguments


def sampling_of(pipe: Any, arguments: Mapping[str, Any]) -> Any:
    """Those of the arguments of a call that say how samples are drawn, as the pipeline's ``sampling_class``.

    Raises:
        ValueError: a value out of range.
    """
    accepted = {field.name for field in fields(pipe.sampling_class)}
    return pipe.sampling_class(**{name: value for name, value in arguments.items() if name in accepted})


def labels_of(pipe: Any, labels: Sequence[str]) -> list[int]:
    """Numbers of the classes that images are made of; all by default.

    Raises:
        ValueError: a label that is no number, or out of range.
    """
    student = pipe.student_class.of_pipeline(pipe)
    words = [label.strip() for label in labels] or [str(i) for i in range(student.num_classes)]
    strange = [word for word in words if not word.isdecimal()]
    if strange:
        raise ValueError(f"labels={strange}: accepted are numbers, 0 to {student.num_classes - 1}")
    numbers = [int(word) for word in words]
    student.encode(pipe, class_labels=numbers)  # refuses a number out of range
    return numbers


def draw_images(
    pipe: Any, seed: int, items: Sequence[int], what: Any, arguments: Mapping[str, Any], output_type: str = "pil"
) -> PipelineOutput:
    """The images with the numbers ``items``, of the labels ``what``: pure functions of the seed and number."""
    return pipe(what, generator=ItemRNG(seed, items).generators(), output_type=output_type, **arguments)
