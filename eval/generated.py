"""Images that a pipeline makes when a metric asks for them."""

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from genkit._diffusers import without_progress_bars
from genkit.denoisers.base import Condition, Denoiser
from genkit.eval.asked import Asked, as_asked
from genkit.eval.inputs import ImageSet, Maker, uint8_kind
from genkit.eval.on_demand import Spool, evaluating
from genkit.eval.preparation import Crop, Preparation, preparation
from genkit.eval.processes import per_image
from genkit.guidance.base import Guider
from genkit.latents import compression
from genkit.pipelines.base import DenoiserPipeline, PipelineOutput
from genkit.pipelines.by_name import parse_guider, parse_steps
from genkit.pipelines.by_student import arguments_of, draw_images, draws_by_labels
from genkit.pipelines.commands import adopt
from genkit.pipelines.numbered import asked_of, described, make_images, num_classes, shape_of_call, steps_of_call
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer, as_written


def generated_images(
    pipe: DiffusionPipeline,
    asked: Asked | Sequence[str] | Sequence[int] | Tensor | int,
    *,
    seed: int = 0,
    num_inference_steps: int | str | StepAnnealer | None = None,
    guider: str | Guider | None = None,
    arguments: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    size: int | None = None,
    crop: Crop | None = None,
    name: str | None = None,
    folder: str | Path | None = None,
) -> ImageSet:
    """Images that ``pipe`` makes when they are asked for, once each: image ``i`` is a function of ``(seed, i)``.

    They are kept in a file in a temporary folder that lasts as long as the set. ``ImageSet.model`` is a
    :class:`Model`, which counts what they take. The pipeline must stay as it is while the set is used; it computes
    where it is, with its modules in evaluation mode. An image that is NaN, or that a safety checker blackened, is one
    that cannot be read.

    Args:
        pipe: of genkit, a ``ClassConditionalPipeline``, ``TextToImagePipeline``, ``FewStepPipeline`` or
            one of token networks (``AutoregressivePipeline`` ...); or one of Diffusers whose components these take.
        asked: what :func:`genkit.eval.asked.matched` or ``evenly`` gives; prompts; labels; or how many, of an
            unconditional network.
        num_inference_steps: by default the pipeline's own; steps that fall (``StepAnnealer``) also as on a command
            line, ``linear:hi=50,lo=5``.
        guider: an object or, as on a command line, ``apg:guidance_scale=4``.
        arguments: others of the pipeline's call, such as ``height`` or ``negative_prompt``.
        batch_size: images that are made together.
        size, crop: see :class:`genkit.eval.preparation.Preparation`, for images that the pipeline makes larger.
        name: what results call the set; by default the pipeline's folder or class.
        folder: where the temporary folder goes, if not where Python puts them.

    Raises:
        ValueError: before any image is made: labels for a network that takes prompts or the reverse, labels out of
            range, settings that the pipeline does not take, no room for the images.
    """
    asked = as_asked(asked)
    prepare = preparation(size, crop)
    name = name or name_of(pipe.config.get("_name_or_path") or type(pipe).__name__)
    settings = dict(arguments or {})
    if isinstance(num_inference_steps, str):
        num_inference_steps = parse_steps(num_inference_steps)
    model: Model
    if draws_by_labels(type(pipe)):
        if guider is not None:
            raise ValueError(f"guider={guider!r}: a {type(pipe).__name__} takes none, but arguments: guidance_scale")
        model = _ByStudent(pipe, asked, seed, settings, name, num_inference_steps)
    else:
        rule = parse_guider(guider) if isinstance(guider, str) else guider
        model = _Denoising(adopt(pipe), asked, seed, settings, name, num_inference_steps, rule)
    c, h, w = model.image_shape
    if prepare is not None and c not in (1, 3):
        raise ValueError(f"size={size}: images of {c} channels cannot be resized; accepted are 1 and 3")
    shape = (c, h, w) if prepare is None else (c, prepare.size, prepare.size)
    spool = Spool(lambda items: _prepared(model, prepare, items), asked.n, shape, batch_size, folder)
    kind = uint8_kind(model.image_shape)
    kind += f", {prepare}" if prepare else ""
    labels, prompts = (asked.labels, asked.prompts) if model.conditional else (None, None)
    return ImageSet(name, asked.n, spool.load, labels, prompts, kind, model=model)


def name_of(folder: str | Path) -> str:
    """What a pipeline is called: its folder, or of ``NAME/pipeline``, as training leaves it, ``NAME``."""
    path = Path(folder)
    return path.absolute().parent.name if path.name == "pipeline" else path.name


def _prepared(model: "Model", prepare: Preparation | None, items: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
    images, bad = model.make(items)
    return images if prepare is None else prepare.batch(images), bad


class Model(Maker, ABC):
    """A pipeline and what it is asked for.

    Attributes:
        image_shape: ``(C, H, W)`` of an image as the pipeline makes it.
        conditional: whether it is told labels or prompts at all.
    """

    pipe: Any
    image_shape: tuple[int, int, int]
    conditional = True

    def __init__(self, asked: Asked, seed: int):
        self.asked, self.seed = asked, seed
        self._calls, self._images = 0, 0
        self._head_calls: int | None = None

    def network_calls(self) -> float | None:
        return per_image(self._calls, self._images)

    def head_calls(self) -> float | None:
        return None if self._head_calls is None else per_image(self._head_calls, self._images)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return _as_evaluated(self.pipe)

    def make(self, items: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        """uint8 ``(B, C, H, W)``, and what is wrong with which row."""
        with self.evaluating():
            output = self._call(items)
        self._calls += output.network_calls * len(items)
        if self._head_calls is not None:
            self._head_calls += output.head_calls * len(items)  # type: ignore[attr-defined]
        self._images += len(items)
        images = output.images.float().cpu()
        flagged = output.nsfw_content_detected or [False] * len(items)
        bad = {}
        for row, item in enumerate(items):
            if images[row].isnan().any():
                bad[row] = f"image {item} of {self.made_with['model']} is NaN"
            elif flagged[row]:
                bad[row] = f"image {item} of {self.made_with['model']} was blackened by the safety checker"
        return (images.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8), bad

    @abstractmethod
    def _call(self, items: Sequence[int]) -> PipelineOutput:
        """What the pipeline makes of these items."""


class _Denoising(Model):
    def __init__(
        self,
        pipe: DenoiserPipeline,
        asked: Asked,
        seed: int,
        arguments: dict[str, Any],
        name: str,
        num_inference_steps: int | StepAnnealer | None,
        guider: Guider | None,
    ):
        super().__init__(asked, seed)
        steps = steps_of_call(pipe, num_inference_steps, arguments)
        takes_prompts, network = pipe.classic is not None, type(pipe.network).__name__
        if takes_prompts and asked.prompts is None:
            has = "no prompts" if asked.labels is None else "labels without names"
            raise ValueError(
                f"{network} takes prompts, and {asked.of} has {has}; accepted are prompts, or labels with class_names"
            )
        self.conditional = takes_prompts or num_classes(pipe.network) > 0
        if self.conditional and not takes_prompts and asked.labels is None:
            raise ValueError(f"{network} takes class labels, and {asked.of} has none")
        # Only what a model takes is told to it; a reference may well know more.
        if takes_prompts:
            self._values: Sequence[Any] = list(asked.prompts or ())
            _, self._given = asked_of(pipe, self._values, ())
        elif self.conditional:
            self._values = asked.labels.tolist()  # type: ignore[union-attr]
            _, self._given = asked_of(pipe, (), [str(label) for label in sorted(set(self._values))])
        else:
            self._values, self._given = [None] * asked.n, None
        with _as_evaluated(pipe):
            self.shape = shape_of_call(pipe, guider, self._given, self._values[0], steps, arguments)
        vae = pipe.components.get("vae")
        factor = pipe.image_processor.config.vae_scale_factor
        channels = self.shape[0] if vae is None else vae.config.out_channels
        self.image_shape = (channels, self.shape[1] * factor, self.shape[2] * factor)
        self.pipe, self._arguments = pipe, {**arguments, "num_inference_steps": steps}
        self.made_with = {"model": name, "steps": steps, "scheduler": type(pipe.scheduler).__name__, "seed": seed}
        chosen = pipe.components.get("guider") if guider is None else guider
        if guider is not None:
            self._arguments["guider"] = guider
        if chosen is not None:
            self.made_with |= {"guider": type(chosen).__module__.rpartition(".")[2], **_settings(chosen)}
        self.made_with |= arguments

    def denoiser(self) -> Denoiser:
        return self.pipe.denoiser()

    def start(self, count: int, seed: int) -> tuple[Tensor, Condition]:
        told = self.pipe.told(self._arguments)
        if self._given:
            told[self._given] = [self._values[i * self.asked.n // count] for i in range(count)]
        condition, device = self.pipe.encode(**told), self.pipe._execution_device
        return ItemRNG(seed, range(count)).normal(self.shape).to(device), condition.to(device)

    def _call(self, items: Sequence[int]) -> PipelineOutput:
        what = [self._values[i] for i in items]
        arguments = {**self._arguments, "output_type": "pt"}
        return make_images(self.pipe, self.seed, items, self._given, what, self.shape, **arguments)


def _settings(guider: Guider) -> dict[str, Any]:
    """Its scale, and what else is not as by default."""
    default = inspect.signature(type(guider)).parameters
    settings = {k: v for k, v in described(guider).items() if k in default}
    return {k: v for k, v in settings.items() if k == "guidance_scale" or v != default[k].default}


class _ByStudent(Model):
    """Of networks that make samples in their own way, such as token after token (``genkit.students``)."""

    def __init__(
        self,
        pipe: Any,
        asked: Asked,
        seed: int,
        arguments: dict[str, Any],
        name: str,
        num_inference_steps: int | StepAnnealer | None,
    ):
        super().__init__(asked, seed)
        student = pipe.student_class.of_pipeline(pipe)
        network, count = type(student.network).__name__, student.num_classes
        self._head_calls = student.head_calls
        self.made_with = {"model": name, "seed": seed, **arguments}
        arguments = arguments_of(pipe, num_inference_steps, arguments)
        if "num_inference_steps" in arguments:
            steps = arguments["num_inference_steps"]
            self.made_with["steps"] = as_written(steps)
        if asked.labels is None:
            raise ValueError(f"{network} takes class labels, and {asked.of} has none")
        least, most = int(asked.labels.min()), int(asked.labels.max())
        if not 0 <= least <= most < count:
            raise ValueError(f"class_labels: {asked.of} has {least} to {most}; accepted are 0 to {count - 1}")
        vae = pipe.components.get("vae")
        c, h, w = student.shape
        factor = compression(vae)
        self.image_shape = (c if vae is None else vae.config.out_channels, h * factor, w * factor)
        self.pipe, self._arguments = pipe, arguments

    def _call(self, items: Sequence[int]) -> PipelineOutput:
        assert self.asked.labels is not None
        labels = self.asked.labels[list(items)]
        return draw_images(self.pipe, self.seed, items, labels, self._arguments, "pt")


@contextlib.contextmanager
def _as_evaluated(pipe: Any) -> Iterator[None]:
    """Without dropout, gradients and progress bars, and after it as before."""
    with without_progress_bars(pipe), evaluating(pipe.components.values()):
        yield
