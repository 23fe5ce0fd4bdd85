"""Images by number, each a function of a seed: what sampling, pairs and evaluation ask a pipeline, and how."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.guidance.base import Guider
from genkit.pipelines.base import DenoiserPipeline, PipelineOutput
from genkit.registry import unknown
from genkit.rng import ItemRNG
from genkit.sampling import check_fit
from genkit.step_annealing import StepAnnealer

# What the command line decides itself, in ways that make an image a function of the seed and its number.
_TAKEN = {"self", "prompt", "class_labels", "condition", "num_inference_steps", "guider", "generator", "latents"}
_TAKEN |= {"num_images_per_prompt", "num_images_per_label", "batch_size", "output_type", "return_dict"}
_TAKEN |= {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "arguments"}


def lines_of(inputs: Path | None) -> list[str]:
    """The lines of a file that are not empty; none without a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no lines.
    """
    if inputs is None:
        return []
    if not inputs.is_file():
        raise FileNotFoundError(f"inputs={str(inputs)!r}: no such file")
    found = [line.strip() for line in inputs.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"inputs={str(inputs)!r} has no lines")
    return found


def asked_of(pipe: DenoiserPipeline, prompts: Sequence[str], labels: Sequence[str]) -> tuple[list, str | None]:
    """What images are made of, and the argument of the call that takes it.

    Raises:
        ValueError: prompts for a network that takes labels or the reverse, an unknown label.
    """
    name = type(pipe.network).__name__
    if pipe.classic is not None:
        if labels or not prompts:
            raise ValueError(f"labels={list(labels)}, prompts={list(prompts)}: {name} takes prompts, at least one")
        return list(prompts), "prompt"
    if prompts:
        raise ValueError(f"prompts={list(prompts)}: {name} takes class labels")
    count = num_classes(pipe.network)
    if count == 0:
        if labels:
            raise ValueError(f"labels={list(labels)}: {name} is unconditional")
        return [None], None
    words = [label.strip() for label in labels] or [str(i) for i in range(count)]
    numbers = [int(w) if w.lstrip("-").isdigit() else pipe.get_label_ids([w])[0] for w in words]
    pipe.encode(class_labels=numbers)  # refuses a number out of range
    return numbers, "class_labels"


def num_classes(network: Any) -> int:
    """Of a network that takes class labels; 0 of an unconditional one."""
    config = network.config
    return config.num_classes if "num_classes" in config else config.num_embeds_ada_norm


def shape_of_call(
    pipe: DenoiserPipeline, rule: Guider | None, given, value, steps: int, extra: dict
) -> tuple[int, ...]:
    """The shape of a sample, after the refusal of whatever the first batch would be refused for."""
    if steps < 1:
        raise ValueError(f"num_inference_steps={steps}: must be at least 1")
    shape = pipe.sample_shape(extra.get("height"), extra.get("width"))
    check_fit(pipe.denoiser(), pipe.scheduler, rule)
    told = pipe.told(extra)
    if given:
        told[given] = [value]
    condition = pipe.encode(**told)
    if rule is not None:
        rule.check((1, *shape), condition)
    return shape


def steps_of_call(
    pipe: DenoiserPipeline, num_inference_steps: int | StepAnnealer | None, extra: Mapping[str, Any]
) -> int:
    """How many steps a call makes, by default the pipeline's own. Refuses arguments that it does not take."""
    if isinstance(num_inference_steps, StepAnnealer):
        raise ValueError(
            f"num_inference_steps={str(num_inference_steps)!r}: steps that fall are those of a diffusion head, of a "
            f"MaskedAutoregressivePipeline; a {type(pipe).__name__} takes a whole number"
        )
    call = inspect.signature(type(pipe).__call__).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in call.values())
    refuse_steps_of(extra)
    for name in extra:
        if name in _TAKEN or not open_ended and name not in call:
            raise ValueError(unknown("arguments: setting", name, call.keys() - _TAKEN))
    return call["num_inference_steps"].default if num_inference_steps is None else num_inference_steps


def refuse_steps_of(extra: Mapping[str, Any]) -> None:
    """Refuse a number of steps among the arguments of a call."""
    if "num_inference_steps" in extra:
        raise ValueError(
            f"arguments: num_inference_steps={extra['num_inference_steps']!r} is a setting of its own, --steps on a "
            "command line: a whole number, or steps that fall, as linear:hi=50,lo=5"
        )


def make_images(
    pipe: DenoiserPipeline,
    seed: int,
    items: Sequence[int],
    given: str | None,
    what: Sequence[Any],
    shape: tuple[int, ...],
    **arguments: Any,
) -> PipelineOutput:
    """The images with the numbers ``items``, of ``what`` each is asked for: pure functions of the seed and number."""
    rng = ItemRNG(seed, items)
    told = {given: list(what)} if given else {"batch_size": len(items)}
    return pipe(latents=rng.normal(shape), generator=rng.generators(), **told, **arguments)


def described(part: Any) -> dict[str, Any]:
    """Class and settings of a component."""
    config = json.loads(part.to_json_string())
    return {"name": type(part).__name__, **{k: v for k, v in config.items() if not k.startswith("_")}}
