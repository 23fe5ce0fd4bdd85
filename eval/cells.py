"""The cells of a sweep: settings from axes, each run once however many ways there are to say it."""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from genkit.guidance.base import Guider
from genkit.pipelines.base import DenoiserPipeline
from genkit.pipelines.by_name import parse_guider, parse_scheduler
from genkit.pipelines.numbered import described

NONE, EMBEDDED = "none", "embedded"


@dataclass(frozen=True)
class Cell:
    """One setting of a model: what ``generated_images`` takes, and what tables say of it.

    ``guider`` is None where the pipeline is called without one, ``told`` what its call gets beside; ``name`` is that
    of the cell's folder: what can be read, and a hash of every setting of scheduler and guider.
    """

    name: str
    made_with: dict[str, Any]
    steps: int
    guider: Guider | None
    told: dict[str, Any]
    scheduler: Any

    @property
    def cost(self) -> float:
        """About how much an image costs, for the time that is left."""
        return self.steps * (2 if self.guider is not None and not self.guider.neutral else 1)


def cells(
    pipe: DenoiserPipeline,
    *,
    steps: Sequence[int],
    guidance: Sequence[float] = (1.0,),
    guiders: Sequence[str] = (),
    schedulers: Sequence[str] = (),
) -> list[Cell]:
    """The product of the axes, without what is the same run twice.

    A guider whose scale makes it follow the conditional prediction (1, of nearly all) is none, so that one cell without
    guidance stands for all guiders. A network that a scale was distilled into is told it, unless guiders are named.

    Args:
        steps: of the scheduler, each at least 1.
        guidance: scales, in Diffusers' convention: 1 is no guidance.
        guiders: as ``genkit sample`` has them, without scale: ``cfg``, ``apg:eta=0``. By default ``cfg``.
        schedulers: likewise; by default the pipeline's own.

    Raises:
        ValueError: an empty axis, a value twice or out of range, an unknown name or setting, guiders at scale 1 alone.
    """
    axes = {"steps": steps, "guidance": guidance, "guider": guiders, "scheduler": schedulers}
    for axis, values in axes.items():
        if not values and axis in ("steps", "guidance"):
            raise ValueError(f"{axis}: no value; at least one is needed")
        for value in values:
            if list(values).count(value) > 1:
                raise ValueError(f"{axis}: {value!r} is named twice")
    for count in steps:
        if count < 1:
            raise ValueError(f"steps={count}: must be at least 1")
    if guiders and all(scale == 1 for scale in guidance):
        raise ValueError(f"guider={guiders[0]!r} has no effect where guidance is 1 alone; give scales: --guidance 1,3")
    paths: list[tuple[str | None, Any]] = [(text, parse_scheduler(text, pipe.scheduler)) for text in schedulers]
    paths = paths or [(None, pipe.scheduler)]
    names: Sequence[str] = guiders or ([EMBEDDED] if pipe.embeds_guidance else ["cfg"])
    found: dict[str, Cell] = {}
    for (text, scheduler), guider, scale, count in itertools.product(paths, names, guidance, steps):
        cell = _cell(pipe, text, scheduler, guider, float(scale), count)
        found.setdefault(cell.name.rpartition("-")[2], cell)
    return list(found.values())


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
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    parts = [f"{steps}-steps", name, *([] if name == NONE else [f"{scale:g}"]), *filter(None, [text])]
    slug = re.sub(r"[^\w.=+-]+", "_", "-".join(parts))[:100]
    made = {"steps": steps, "guidance_scale": scale, "guider": name, "scheduler": text or type(scheduler).__name__}
    return Cell(f"{slug}-{digest}", made, steps, rule, told, scheduler)


def _guider(text: str, scale: float) -> Guider:
    rule = parse_guider(text)
    if "guidance_scale" not in rule.config:
        raise ValueError(f"guider={text!r} has no guidance_scale to sweep over")
    if re.search(r"[:,]\s*guidance_scale\s*=", text):
        raise ValueError(f"guider={text!r}: the scales are those of guidance; leave guidance_scale out")
    return rule.new(guidance_scale=scale)
