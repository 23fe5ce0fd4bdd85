"""What ``genkit sample`` does."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from genkit._files import first_line
from genkit.adapters import parse_adapter
from genkit.pipelines.base import DenoiserPipeline
from genkit.pipelines.by_name import parse_guider, parse_scheduler, parse_settings, parse_steps
from genkit.pipelines.by_student import arguments_of, draw_images, draws_by_labels, labels_of, student_pipelines
from genkit.pipelines.class_conditional import ClassConditionalPipeline
from genkit.pipelines.few_step import FewStepPipeline
from genkit.pipelines.image_folder import ImageFolder
from genkit.pipelines.numbered import asked_of, described, lines_of, make_images, shape_of_call, steps_of_call
from genkit.pipelines.text_to_image import TextToImagePipeline
from genkit.registry import unknown
from genkit.step_annealing import StepAnnealer, as_written

PIPELINES = {cls.__name__: cls for cls in (ClassConditionalPipeline, FewStepPipeline, TextToImagePipeline)}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def load_pipeline(pipeline: str | Path, **kwargs: Any) -> DenoiserPipeline:
    """The pipeline of genkit for a folder or a repository of the Hub: the one that was saved, or, for one of Diffusers,
    the one that takes its components.

    Raises:
        FileNotFoundError: no pipeline there.
        ValueError: a pipeline that makes images of neither prompts nor labels, or one of a network that is no denoiser,
            or a part is missing there.
    """
    index = _index(pipeline)
    return _read(_class_for(index["_class_name"], index, f"pipeline={str(pipeline)!r}"), pipeline, kwargs)


def load_any(pipeline: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """As :func:`load_pipeline`; of a network that is no denoiser (``genkit.students``), the pipeline that was saved.

    Raises:
        FileNotFoundError, ValueError: as there; a pipeline that makes images of images.
    """
    index = _index(pipeline)
    own = student_pipelines().get(index["_class_name"])
    if own is None:
        return load_pipeline(pipeline, **kwargs)
    if not draws_by_labels(own):
        raise ValueError(
            f"pipeline={str(pipeline)!r} is a {own.__name__}, which makes images of images: call it in Python, or "
            "measure it by `genkit eval run` and reconstructed:FOLDER"
        )
    return _read(own, pipeline, kwargs)


def _index(pipeline: str | Path) -> dict:
    folder = Path(pipeline)
    if not (folder / "model_index.json").is_file() and (
        folder.exists() or not re.fullmatch(r"[\w-]+/[\w.-]+", str(pipeline))
    ):
        raise FileNotFoundError(f"pipeline={str(pipeline)!r} has no model_index.json: not a Diffusers pipeline folder")
    try:
        return DiffusionPipeline.load_config(str(pipeline))  # type: ignore[return-value]
    except OSError as error:
        raise FileNotFoundError(
            f"pipeline={str(pipeline)!r} is no folder, nor found on the Hub: {first_line(error)}"
        ) from error


def _read(cls: Any, pipeline: str | Path, kwargs: dict[str, Any]) -> Any:
    try:
        with torch.random.fork_rng(devices=[]):  # networks draw their first weights before they are given those there
            return cls.from_pretrained(str(pipeline), **kwargs)
    except OSError as error:
        raise ValueError(
            f"pipeline={str(pipeline)!r} could not be read: {first_line(error)}; accepted are a whole "
            "pipeline folder and a name (owner/name) on the Hub"
        ) from error


def adopt(pipe: DiffusionPipeline) -> DenoiserPipeline:
    """The pipeline of genkit for one that is loaded: itself, or for one of Diffusers the one that takes its components,
    shared and not copied.

    Raises:
        ValueError: a pipeline that makes images of neither prompts nor labels.
    """
    if isinstance(pipe, DenoiserPipeline) and isinstance(pipe, tuple(PIPELINES.values())):
        return pipe
    return _class_for(type(pipe).__name__, pipe.components, "the pipeline").from_pipe(pipe)


def _class_for(name: str, parts: Mapping[str, Any], what: str) -> type[DenoiserPipeline]:
    """``parts``: what the pipeline called ``name`` has, by name; ``what`` names it in the error."""
    if name in PIPELINES:
        return PIPELINES[name]
    if name in student_pipelines():
        raise ValueError(
            f"{what} is of the class {name}, of a network that is no denoiser; accepted here are {', '.join(PIPELINES)}"
        )
    if parts.get("text_encoder"):
        return TextToImagePipeline
    if parts.get("transformer"):
        return ClassConditionalPipeline
    raise ValueError(
        f"{what} is a {name}; accepted are {', '.join(PIPELINES)} and the pipelines of "
        "Diffusers whose components these take"
    )


def sample_to_folder(
    pipeline: str | Path,
    output: Path,
    *,
    prompts: Sequence[str] = (),
    labels: Sequence[str] = (),
    inputs: Path | None = None,
    num_inference_steps: int | str | StepAnnealer | None = None,
    num_images: int = 1,
    guider: str | None = None,
    scheduler: str | None = None,
    adapters: Sequence[str] = (),
    arguments: str = "",
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str = "float32",
    offload: bool = False,
    quiet: bool = False,
) -> Path:
    """Write PNG files (``label/000123.png``, or ``000123.png`` of prompts), ``grid.png`` and ``metadata.jsonl``.

    Image ``i`` is a pure function of ``(seed, i)``: the batch size does not change it, and images that are there
    already, from an earlier call with the same settings, are not made again.

    Args:
        pipeline: a folder or a repository of the Hub; see :func:`load_any`.
        output: the folder to write to, which is returned.
        prompts, labels: what to make images of, by which of the two the network takes; labels by number or name. All
            labels by default.
        inputs: a file with more of them, one a line; empty lines do not count.
        num_inference_steps: by default the pipeline's own; see :func:`parse_steps`.
        num_images: of each prompt or label; of an unconditional network, in all.
        guider, scheduler: see :func:`parse_guider`, :func:`parse_scheduler`.
        adapters: LoRAs and SaRAs as ``folder`` or ``folder=0.7``, added up with these scales, and words or classes
            that were learned.
        arguments: others of the pipeline's call, as ``height=512,negative_prompt='blurry'``.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        offload: keep only the component that is computing on the device.

    Raises:
        ValueError: settings other than those of the images that are there; a prompt, label or setting that is not
            accepted; before anything is written.
        FileNotFoundError: no pipeline there, or no file of inputs.
    """
    for name, count in {"batch_size": batch_size, "num_images": num_images}.items():
        if count < 1:
            raise ValueError(f"{name}={count}: must be at least 1")
    if dtype not in DTYPES:
        raise ValueError(unknown("dtype", dtype, DTYPES))
    lines = lines_of(inputs)
    rule = None if guider is None else parse_guider(guider)
    if isinstance(num_inference_steps, str):
        num_inference_steps = parse_steps(num_inference_steps)
    extra = parse_settings("arguments", arguments)
    loras = [parse_adapter(text) for text in adapters]
    pipe: Any = load_any(pipeline, dtype=DTYPES[dtype])
    student = not isinstance(pipe, DenoiserPipeline)
    if student:
        refused = {"guider": guider, "scheduler": scheduler, "adapters": list(adapters), "prompts": list(prompts)}
        for name, value in refused.items():
            if value:
                raise ValueError(
                    f"{name}={value!r}: a pipeline of the class {type(pipe).__name__} takes none; accepted are labels, "
                    "and arguments (--set on a command line), of which guidance_scale is one"
                )
    for i, (path, scale) in enumerate(loras):
        pipe.load_adapter(path, f"adapter_{i}", scale)
    if scheduler is not None:
        pipe.register_modules(scheduler=parse_scheduler(scheduler, pipe.scheduler))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given: str | None
    steps: Any
    if student:
        call = arguments_of(pipe, num_inference_steps, extra)
        steps, asked, given = call.get("num_inference_steps"), labels_of(pipe, [*labels, *lines]), "class_labels"
    else:
        steps = steps_of_call(pipe, num_inference_steps, extra)
        if lines:
            prompts, labels = ([*prompts, *lines], labels) if pipe.classic is not None else (prompts, [*labels, *lines])
        asked, given = asked_of(pipe, prompts, labels)
    pipe.enable_model_cpu_offload(device=device) if offload else pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    items = [value for value in asked for _ in range(num_images)]
    if student:
        make = partial(draw_images, pipe, seed, arguments=call)
    else:
        shape = shape_of_call(pipe, rule, given, asked[0], steps, extra)
        ruled = extra if rule is None else {**extra, "guider": rule}
        make = partial(make_images, pipe, seed, given=given, shape=shape, num_inference_steps=steps, **ruled)
    settings = {
        "pipeline": str(Path(pipeline).resolve()) if Path(pipeline).exists() else str(pipeline),
        "asked": asked,
        "num_images": num_images,
        "num_inference_steps": as_written(steps),
        "guider": None if rule is None else described(rule),
        "scheduler": None if student else described(pipe.scheduler),
        # None without any: the folders that earlier versions made do not name them.
        "adapters": [[str(Path(path).resolve()) if Path(path).exists() else path, s] for path, s in loras] or None,
        "arguments": extra,
        "dtype": dtype,
        "seed": seed,
    }
    folder = ImageFolder(output, settings, [_row(i, value, given) for i, value in enumerate(items)])
    missing = folder.missing
    with tqdm(total=len(items), initial=len(items) - len(missing), unit="image", disable=quiet or None) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for i, image in zip(batch, make(items=batch, what=[items[i] for i in batch]).images, strict=True):
                folder.save(i, image)
            bar.update(len(batch))
    square = math.ceil(math.sqrt(min(len(items), 400)))
    folder.finish(columns=num_images if 1 < num_images <= 20 else square)
    return output


def _row(i: int, value: Any, given: str | None) -> dict[str, Any]:
    if given == "class_labels":
        return {"file_name": f"{value}/{i:06d}.png", "label": value, "item": i}
    row = {"file_name": f"{i:06d}.png", "item": i}
    return row if given is None else {**row, "text": value}
