"""The sides of an evaluation as a command line writes them: files, ``pipeline:FOLDER``, ``reconstructed:FOLDER``."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from genkit.eval.asked import TEMPLATE, Asked, evenly, matched
from genkit.eval.feature_files import is_features, load_features
from genkit.eval.generated import generated_images, name_of
from genkit.eval.inputs import ImageSet, drawn, read_images
from genkit.eval.metrics.base import FeatureSet
from genkit.eval.preparation import Crop
from genkit.eval.reconstructed import load_autoencoder, reconstructed_images
from genkit.eval.statistics import FeatureStats, is_statistics
from genkit.pipelines.base import DenoiserPipeline
from genkit.pipelines.by_name import parse_scheduler, parse_settings
from genkit.pipelines.commands import DTYPES, load_any
from genkit.pipelines.numbered import lines_of, num_classes
from genkit.registry import unknown

PIPELINE, RECONSTRUCTED = "pipeline:", "reconstructed:"
Side = str | Path | ImageSet | FeatureSet | FeatureStats


@dataclass(frozen=True)
class Generation:
    """How ``pipeline:FOLDER`` makes images; what is None is as the pipeline has it.

    ``steps``, ``guider``, ``scheduler`` and ``arguments`` as for ``genkit sample``; ``inputs``, a file
    with a prompt or a label a line, instead of those of the reference; ``class_names``, a JSON file of names by label,
    and ``template``, for prompts out of labels; ``dtype`` of the networks.
    """

    steps: int | str | None = None
    guider: str | None = None
    scheduler: str | None = None
    arguments: str | None = None
    inputs: Path | None = None
    class_names: Path | None = None
    template: str | None = None
    dtype: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


def open_sides(
    reference: str | Path,
    generated: str | Path,
    *,
    n: int | None = None,
    size: int | None = None,
    crop: Crop | None = None,
    generation: Generation | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    strict: bool = False,
) -> tuple[Side, Side, int | None]:
    """Both sides, as :func:`genkit.eval.run.evaluate` takes them, and the ``n`` that it is still to draw.

    ``pipeline:FOLDER`` makes an image for each one of the reference, or for ``n`` of them, of its label or prompt
    (:func:`genkit.eval.asked.matched`); where the reference knows neither, as saved statistics, ``n`` images of all
    classes equally often. ``reconstructed:FOLDER`` is of the reference's images, or with ``,of=IMAGES`` of others.

    Args:
        size, crop: of images read, and of those that a pipeline makes.
        generation: for ``pipeline:FOLDER`` only.

    Raises:
        ValueError: settings that have no effect or do not fit, before an image is made.
        FileNotFoundError: no such file or folder.
    """
    given = {} if generation is None else generation.given
    text = str(generated)
    if given and not text.startswith(PIPELINE):
        raise ValueError(f"{', '.join(given)}: for images of 'pipeline:FOLDER', and the generated ones are {text!r}")
    on_demand = text.startswith((PIPELINE, RECONSTRUCTED))

    def images(path: str | Path, role: str) -> Side:
        if is_features(path) or Path(path).is_file() and is_statistics(path):
            return path
        return drawn(read_images(path, size=size, crop=crop, strict=strict), n, seed, role)

    real = images(reference, "reference")
    if not on_demand:
        return real, images(generated, "generated"), n
    if text.startswith(RECONSTRUCTED):
        folder, _, of = text[len(RECONSTRUCTED) :].partition(",of=")
        originals = images(of, "generated") if of else real
        if not isinstance(originals, ImageSet):
            raise ValueError(f"{text!r}: statistics cannot be reconstructed; name images, as {text},of=IMAGES")
        autoencoder = load_autoencoder(folder).to(device)
        return real, reconstructed_images(autoencoder, originals, batch_size=min(batch_size, 64)), None
    chosen = generation or Generation()
    if chosen.dtype is not None and chosen.dtype not in DTYPES:
        raise ValueError(unknown("dtype", chosen.dtype, DTYPES))
    pipe = _pipeline(text[len(PIPELINE) :], chosen, device)
    made = generated_images(
        pipe,
        _asked(pipe, real, n, chosen),
        seed=seed,
        num_inference_steps=chosen.steps,
        guider=chosen.guider,
        arguments=parse_settings("arguments", chosen.arguments or ""),
        batch_size=min(batch_size, 64),
        size=size,
        crop=crop,
        name=name_of(text[len(PIPELINE) :]),
    )
    if chosen.scheduler is not None:
        made.model.made_with["scheduler"] = chosen.scheduler  # type: ignore[union-attr]  # with its settings
    return real, made, None


def _pipeline(folder: str, chosen: Generation, device: torch.device | str) -> DiffusionPipeline:
    pipe = load_any(folder, dtype=DTYPES[chosen.dtype or "float32"])
    if chosen.scheduler is not None:
        if not isinstance(pipe, DenoiserPipeline):
            raise ValueError(f"scheduler={chosen.scheduler!r}: a pipeline of the class {type(pipe).__name__} has none")
        pipe.register_modules(scheduler=parse_scheduler(chosen.scheduler, pipe.scheduler))
    return pipe.to(device)


def _asked(
    pipe: DiffusionPipeline, real: Side, n: int | None, chosen: Generation
) -> Asked | list[str] | list[int] | int:
    takes_prompts = isinstance(pipe, DenoiserPipeline) and pipe.classic is not None
    if isinstance(pipe, DenoiserPipeline):
        network, classes = pipe.network, 0 if takes_prompts else num_classes(pipe.network)
    else:
        network, classes = pipe.transformer, pipe.transformer.config.num_classes  # type: ignore[attr-defined]
    if not takes_prompts:
        for setting in ("class_names", "template"):
            if (value := getattr(chosen, setting)) is not None:
                raise ValueError(f"{setting}={str(value)!r} is for prompts, and {type(network).__name__} takes none")
    if chosen.inputs is not None:
        for setting, value in {"n": n, "class_names": chosen.class_names, "template": chosen.template}.items():
            if value is not None:
                raise ValueError(f"{setting}={str(value)!r} has no effect with inputs, which has all there is to make")
        lines = lines_of(chosen.inputs)
        if takes_prompts or classes == 0:
            return lines
        return [int(w) if w.isdigit() else pipe.get_label_ids([w])[0] for w in lines]  # type: ignore[attr-defined]
    known: Any = load_features(real) if isinstance(real, str | Path) and is_features(real) else real
    known = known if isinstance(known, ImageSet | FeatureSet) else None
    if takes_prompts or classes and known is not None and known.labels is not None:
        if known is None:
            raise ValueError(f"{type(network).__name__} takes prompts, and {real} has none; inputs is a file of them")
        names = None if chosen.class_names is None else _names(chosen.class_names)
        return matched(known, n, class_names=names, template=chosen.template or TEMPLATE)
    n = known.n if n is None and known is not None else n
    if n is None:
        raise ValueError(f"n=None: {real} does not say what to make; say how many images, or give inputs")
    return evenly(classes, n) if classes else n


def _names(path: Path) -> dict[int, str]:
    """A list of names, or an object of names by number."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pairs = enumerate(found) if isinstance(found, list) else ((int(k), v) for k, v in found.items())
        return {i: str(name) for i, name in pairs}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"class_names={str(path)!r}: expected JSON, a list or names by number ({error})") from error
