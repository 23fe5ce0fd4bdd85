"""What the ``README.md`` beside a trained pipeline says: what it is, and how it is loaded."""

import json
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline

from genkit.hub import model_card
from genkit.pipelines.by_student import draws_by_labels
from genkit.pipelines.commands import PIPELINES
from genkit.registry import members
from genkit.training.config import TrainConfig


def write_card(folder: Path, config: TrainConfig) -> None:
    """The model card of the pipeline in ``folder``, which ``config`` trained."""
    name = _class_name(folder)
    card = model_card(
        config.objective.name,
        config.model_dump(mode="json", exclude_unset=True),
        code=usage(folder),
        title=config.output_dir.name,
        description=f"{'An' if name[0] in 'AEIO' else 'A'} {name}, trained by {config.objective.name}.",
        base_model=base_model(config.model.pretrained),
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def base_model(pretrained: str | None) -> str | None:
    """The repository of the Hub; ``None`` for a folder here, which nobody else has."""
    return None if pretrained is None or Path(pretrained).exists() else pretrained


def usage(folder: Path, steps: int | None = None) -> str:
    """Lines of Python that load the pipeline in ``folder`` and, where it makes pictures of noise, draw with it.

    Args:
        steps: of a few-step student, which is sampled without guidance; by default as the pipeline does by itself.
    """
    name, where = _class_name(folder), folder.as_posix()
    if hasattr(diffusers, name):
        loading = (
            "import genkit  # makes its schedulers known to Diffusers\n"
            "from diffusers import DiffusionPipeline\n"
            f'pipe = DiffusionPipeline.from_pretrained("{where}")\n'
        )
        few = f", num_inference_steps={steps}, guidance_scale=1.0"
    else:
        ours = {c.__name__: c for c in members("genkit.pipelines", DiffusionPipeline).values()}
        imported = f"from {ours[name].__module__} import {name}\n" if name in ours else ""  # or a class of one's own
        loading = f'{imported}pipe = {name}.from_pretrained("{where}")'
        if name not in PIPELINES and not draws_by_labels(ours.get(name)):
            return loading
        loading += "\n"
        few = f", num_inference_steps={steps}"
    return f"{loading}images = pipe({_asked(folder)}{few if steps else ''}).images"


def _asked(folder: Path) -> str:
    """The first argument of a call."""
    if _index(folder).get("text_encoder", [None])[0]:
        return '"a lighthouse at dusk"'
    network = _json(folder / "transformer" / "config.json")
    return "batch_size=4" if network.get("num_classes") == 0 else "class_labels=[0, 1, 2, 3]"


def _class_name(folder: Path) -> str:
    return _index(folder)["_class_name"]


def _index(folder: Path) -> dict:
    return _json(folder / "model_index.json")


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
