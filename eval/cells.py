"""The cells of a sweep: settings from axes, each run once however many ways there are to say it."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from genkit.guidance.base import Guider
from genkit.pipelines.base import DenoiserPipeline
from genkit.pipelines.by_name import parse_guider, parse_scheduler
from genkit.pipelines.by_student import arguments_of, draws_by_labels, sampling_of
from genkit.pipelines.numbered import described
from genkit.step_annealing import StepAnnealer, as_written

NONE, EMBEDDED = "none", "embedded"


@dataclass(frozen=True)
class Cell:
    """One setting of a model: what ``generated_images`` takes, and what tables say of it.

    ``guider`` is None where the pipeline is called without one, ``told`` what its call gets beside; ``scheduler`` is
    None, and ``steps`` may be, of a network that is no denoiser. ``name`` is that of the cell's folder: what can be
    read, and a hash of every setting. ``cost`` is about how much an image costs, for the time that is left.
    """

    name: str
    made_with: dict[str, Any]
    steps: int | StepAnnealer | None
    cost: float
    guider: Guider | None = None
    told: dict[str, Any] = field(default_factory=dict)
    scheduler: Any = None


def cells(
    pipe: Any,
    *,
    steps: Sequence[int | StepAnnealer] = (),
    guidance: Sequence[float] = (1.0,),
    guiders: Sequence[str] = (),
    schedulers: Sequence[str] = (),
    over: Mapping[str, Sequence[Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """The product of the axes, without what is the same run twice.

    A guider whose scale makes it follow the conditional prediction (1, of nearly all) is none, so that one cell without
    guidance stands for all guiders. A network that a scale was distilled into is told it, unless guiders are named. Of
    networks that make samples in their own way, such as token after token (``genkit.students``), other settings can be
    axes; one cell without guidance stands for all values of those that begin with ``guidance_``.

    Args:
        steps: of the scheduler, each at least 1; of a diffusion head, by default the pipeline's own.
        guidance: scales, in Diffusers' convention: 1 is no guidance.
        guiders: as ``genkit sample`` has them, without scale: ``cfg``, ``apg:eta=0``. By default ``cfg``.
        schedulers: likewise; by default the pipeline's own.
        over: of a network that is no denoiser, settings of the pipeline's call with the values of each.
        arguments: what every call gets besides.

    Raises:
        ValueError: an empty axis, a value twice or out of range, an unknown name or setting, guiders at scale 1 alone,
            an axis that the network does not have.
    """
    over, student = over or {}, draws_by_labels(type(pipe))
    axes = {"steps": steps, "guidance": guidance, "guider": guiders, "scheduler": schedulers, **over}
    needed = {"guidance", *over} if student else {"guidance", "steps"}
    for axis, values in axes.items():
        if not values and axis in needed:
            raise ValueError(f"{axis}: no value; at least one is needed")
        for value in values:
            if list(values).count(value) > 1:
                raise ValueError(f"{axis}: {value!r} is named twice")
    if student:
        for axis in ("guider", "scheduler"):
            if axes[axis]:
                raise ValueError(
                    f"{axis}={axes[axis][0]!r}: {type(pipe).__name__} takes none; its axes are guidance, steps where "
                    "it has a diffusion head, and settings of its call (--over)"
                )
        return _student_cells(pipe, steps or [None], guidance, over, arguments or {})
    if over:
        raise ValueError(
            f"over={dict(over)}: the axes of {type(pipe).__name__} are steps, guidance, guider and scheduler; one "
            "value for all cells goes into arguments (--set)"
        )
    for count in steps:
        if isinstance(count, StepAnnealer):
            raise ValueError(
                f"steps={count}: steps that fall are those of a diffusion head; accepted are whole numbers"
            )
        if count < 1:
            raise ValueError(f"steps={count}: must be at least 1")
    if guiders and all(scale == 1 for scale in guidance):
        raise ValueError(f"guider={guiders[0]!r} has no effect where guidance is 1 alone; give scales: --guidance 1,3")
    paths: list[tuple[str | None, Any]] = [(text, parse_scheduler(text, pipe.scheduler)) for text in schedulers]
    paths = paths or [(None, pipe.scheduler)]
    names: Sequence[str] = guiders or ([EMBEDDED] if pipe.embeds_guidance else ["cfg"])
    return _distinct(
        _cell(pipe, text, scheduler, guider, float(scale), count)  # type: ignore[arg-type]
        for (text, scheduler), guider, scale, count in itertools.product(paths, names, guidance, steps)
    )


def _distinct(found: Iterable[Cell]) -> list[Cell]:
    by_hash: dict[str, Cell] = {}
    for cell in found:
        by_hash.setdefault(cell.name.rpartition("-")[2], cell)
    return list(by_hash.values())


def _name(key: Mapping[str, Any], *words: str | None) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^\w.=+-]+", "_", "-".join(filter(None, words)))[:100]
    return f"{slug}-{digest}"


def _student_cells(
    pipe: Any,
    steps: Sequence[int | StepAnnealer | None],
    guidance: Sequence[float],
    over: Mapping[str, Sequence[Any]],
    arguments: Mapping[str, Any],
) -> list[Cell]:
    for name in over:
        if name in arguments:
            raise ValueError(f"over: {name} is among the arguments of every call, too; give one of the two")
        if name in ("guidance_scale", "num_inference_steps"):
            raise ValueError(f"over: {name} is an axis of its own: {'guidance' if name[0] == 'g' else 'steps'}")
    found = []
    for values, scale, count in itertools.product(itertools.product(*over.values()), guidance, steps):
        settings = dict(zip(over, values, strict=True))
        if scale == 1:
            settings = {name: value for name, value in settings.items() if not name.startswith("guidance_")}
        told = {"guidance_scale": float(scale), **settings}
        call = arguments_of(pipe, count, {**arguments, **told})
        used = call.get("num_inference_steps")  # the pipeline's own by default, and none of one that takes none
        made = told if used is None else {"steps": as_written(used), **told}
        words = [f"{name}={value}" for name, value in settings.items()]
        name = _name(made, None if used is None else f"{as_written(used)}-steps", f"cfg-{scale:g}", *words)
        cost = pipe.student_class.of_pipeline(pipe).cost(sampling_of(pipe, call))
        found.append(Cell(name, made, used, cost, told=told))
    return _distinct(found)


def _cell(pipe: DenoiserPipeline, text: str | None, scheduler: Any, name: str, scale: float, steps: int) -> Cell:
    rule, told = None, {}
    if name == EMBEDDED:
        if not pipe.embeds_guidance:
            raise ValueError(f"guider={EMBEDDED!r}: {type(pipe.network).__name__} was distilled for no guidance scale")
        told = {"guidance_scale": scale}
    else:
        rule = _guider(name, scale)
        if rule.neutral:
            name = NONE
            # A pipeline with a guider of its own would use it; flow maps take none.
            rule = None if pipe.components.get("guider") is None else _guider("cfg", 1.0)
    key = {"steps": steps, "guider": rule and described(rule), "told": told, "scheduler": described(scheduler)}
    made = {"steps": steps, "guidance_scale": scale, "guider": name, "scheduler": text or type(scheduler).__name__}
    slug = _name(key, f"{steps}-steps", name, None if name == NONE else f"{scale:g}", text)
    cost = steps * (2 if rule is not None and not rule.neutral else 1)
    return Cell(slug, made, steps, cost, rule, told, scheduler)


def _guider(text: str, scale: float) -> Guider:
    rule = parse_guider(text)
    if "guidance_scale" not in rule.config:
        raise ValueError(f"guider={text!r} has no guidance_scale to sweep over")
    if re.search(r"[:,]\s*guidance_scale\s*=", text):
        raise ValueError(f"guider={text!r}: the scales are those of guidance; leave guidance_scale out")
    return rule.new(guidance_scale=scale)
