"""What a saved student makes of noise in 1, 2, 4 and 8 steps, as far as it can be measured without a further model."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from genkit.data.base import Source
from genkit.eval.extractors.base import Extractor
from genkit.eval.inputs import to_uint8
from genkit.eval.run import evaluate
from genkit.pipelines.base import DenoiserPipeline
from genkit.pipelines.commands import load_pipeline
from genkit.registry import members
from genkit.rng import ItemRNG, hash_seed
from genkit.training.config import TrainConfig
from genkit.training.health import Health
from genkit.training.inputs import Inputs
from genkit.training.objectives.base import DivergedError

logger = logging.getLogger("genkit.training")

STEPS = (1, 2, 4, 8)
_METRICS = ("frechet", "prdc", "accuracy")
_WANTED = ("frechet_distance", "class_accuracy", "recall")


def measure_few_steps(
    folder: Path, source: Source, config: TrainConfig, *, batch_size: int = 64, quiet: bool = False
) -> list[dict[str, Any]]:
    """A row of measures for every number of steps that the pipeline in ``folder`` takes.

    ``network_calls`` of a picture; ``saturation`` and ``variance_ratio`` beside the data, where there is any (see
    :class:`genkit.training.health.Health`); Frechet distance, accuracy and recall where ``genkit.eval`` has an
    extractor of the data's name: of as many pictures as the data has, at most 2,000, under its labels or prompts.
    """
    try:
        pipe = load_pipeline(folder)
    except ValueError as error:
        logger.info("not measured at few steps: %s", error)
        return []
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = Inputs(pipe, pipe.denoiser(), source, config.seed)
    known = config.data.name in members("genkit.eval.extractors", Extractor)
    n = min(len(source), 2000 if known else 16)
    read = source.__getitems__(range(n))
    real = inputs.pixels(read["x0"].to(pipe.device)).cpu() if "x0" in read else None
    size = _size(pipe, inputs, read)
    rows: list[dict[str, Any]] = []
    for steps in STEPS:
        try:
            pixels, calls = _draw(pipe, size, read, steps, n, hash_seed(config.seed, *b"few steps"), batch_size, quiet)
        except ValueError as error:
            if not rows:
                raise
            logger.info("not measured at %d steps or more: %s", steps, error)  # the student knows fewer times
            break
        row: dict[str, Any] = {"steps": steps, "network_calls": calls}
        try:
            measures, alarms = Health(config.health).samples(config.max_train_steps, pixels, real)
        except DivergedError as error:
            measures, alarms = {}, [str(error)]
        for alarm in alarms:
            logger.warning("at %d steps: %s", steps, alarm)
        row |= {name.removeprefix("samples/"): value for name, value in measures.items()}
        if known and real is not None:
            images = to_uint8(pixels)
            generated = (images, read["class_labels"]) if "class_labels" in read else images
            result = evaluate(to_uint8(real), generated, metrics=_METRICS, extractor=config.data.name, quiet=True)
            row |= {name: result.values[name] for name in _WANTED if name in result.values}
        rows.append(row)
    return rows


def _size(pipe: DenoiserPipeline, inputs: Inputs, read: dict[str, Any]) -> dict[str, int]:
    """The pictures' size in training, where the pipeline has others; empty where nothing tells."""
    if pipe.classic is None or "x0" not in read:
        return {}
    factor = 1 if inputs.vae is not None else pipe.classic.vae_scale_factor
    height, width = (factor * n for n in read["x0"].shape[-2:])
    return {"height": height, "width": width}


def _draw(
    pipe: DenoiserPipeline,
    size: dict[str, int],
    read: dict[str, Any],
    steps: int,
    n: int,
    seed: int,
    batch_size: int,
    quiet: bool,
) -> tuple[Tensor, int]:
    """Pictures ``(n, C, H, W)`` in [-1, 1], on the CPU, and the network calls that each took."""
    shape, pictures, calls = pipe.sample_shape(**size), [], 0
    with tqdm(total=n, desc=f"{steps} steps", unit="image", delay=2, leave=False, disable=quiet or None) as bar:
        for items in torch.arange(n).split(batch_size):
            rng = ItemRNG(seed, items)
            if pipe.classic is not None:
                what: dict[str, Any] = {"prompt": [read["prompts"][i] for i in items.tolist()]}
            elif "class_labels" in read:
                what = {"class_labels": read["class_labels"][items]}
            else:
                what = {"batch_size": len(items)}
            out = pipe(
                num_inference_steps=steps,
                latents=rng.normal(shape),
                generator=rng.generators(),
                output_type="pt",
                **size,
                **what,
            )
            pictures.append(2 * out.images.float().cpu() - 1)
            calls = out.network_calls
            bar.update(len(items))
    return torch.cat(pictures), calls
