"""What the images of a folder were made with, where ``genkit sample`` wrote it."""

import inspect
import json
from pathlib import Path
from typing import Any

from genkit.eval.generated import name_of
from genkit.guidance.base import Guider
from genkit.registry import members

_SETTINGS = "settings.json"


def sampled_with(folder: str | Path) -> dict[str, Any]:
    """``model``, ``steps``, ``scheduler``, ``guider`` and its scale ..., as an evaluation records them; or nothing."""
    file = Path(folder) / _SETTINGS
    if not file.is_file():
        return {}
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        made = {"model": name_of(told["pipeline"]), "steps": told["num_inference_steps"], "seed": told["seed"]}
        if made["steps"] is None:  # of a network that takes none
            del made["steps"]
        if told["scheduler"] is not None:  # of a network that is a denoiser
            made["scheduler"] = told["scheduler"]["name"]
        guider, more = told["guider"], told["arguments"]
        if guider is not None:
            made |= _guider(guider)
        if told.get("adapters"):
            made["adapters"] = told["adapters"]
        return {**made, **more}
    except (ValueError, KeyError, TypeError):  # another program's file of this name
        return {}


def _guider(told: dict[str, Any]) -> dict[str, Any]:
    """Its name, its scale, and what else is not as by default."""
    for name, cls in members("genkit.guidance", Guider).items():
        if cls.__name__ == told["name"]:
            default = inspect.signature(cls).parameters
            return {"guider": name} | {
                k: v for k, v in told.items() if k in default and (k == "guidance_scale" or v != default[k].default)
            }
    return {"guider": told["name"]}
