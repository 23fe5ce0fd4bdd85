"""What ``genkit sample`` does."""

import inspect
import json
from ast import literal_eval
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from genkit.denoisers import from_pipeline
from genkit.guidance.base import Guider
from genkit.pipelines.class_conditional import ClassConditionalPipeline
from genkit.registry import lookup, unknown
from genkit.rng import ItemRNG


def parse_guider(text: str) -> Guider:
    """A guider from ``name`` or ``name:key=value,key=value``, values as Python literals.

    Raises:
        ValueError: an unknown name or setting, or a value that the guider refuses.
    """
    name, _, rest = text.partition(":")
    cls = lookup("genkit.guidance", Guider, name, setting="guider")
    accepted = [k for k in inspect.signature(cls.__init__).parameters if k not in ("self", "scheduler_config")]
    settings = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or key not in accepted:
            raise ValueError(unknown(f"guider {name!r}: setting", key, accepted))
        try:
            settings[key] = literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return cls(**settings)


def sample_to_folder(
    pipeline: Path,
    output: Path,
    *,
    labels: list[str],
    num_inference_steps: int = 32,
    num_images_per_label: int = 1,
    guider: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
    quiet: bool = False,
) -> Path:
    """Write ``label/000123.png`` files, ``grid.png`` and ``metadata.jsonl`` below ``output``, and return it.

    Image ``i`` is a pure function of ``(seed, i)``: the batch size does not change it, and images that are there
    already, from an earlier call with the same settings, are not made again.

    Raises:
        ValueError: settings other than those of the images that are there; a label, guider or batch size that is not
            accepted.
        FileNotFoundError: no pipeline there.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    if num_images_per_label < 1:
        raise ValueError(f"num_images_per_label={num_images_per_label}: must be at least 1")
    if not (pipeline / "model_index.json").is_file():
        raise FileNotFoundError(f"pipeline={str(pipeline)!r} has no model_index.json: not a Diffusers pipeline folder")
    rule = None if guider is None else parse_guider(guider)
    pipe = ClassConditionalPipeline.from_pretrained(str(pipeline))
    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipe.set_progress_bar_config(disable=True)
    numbers = [int(v) if v.strip().lstrip("-").isdigit() else pipe.get_label_ids([v.strip()])[0] for v in labels]
    classes = torch.tensor(numbers).repeat_interleave(num_images_per_label)
    from_pipeline(pipe).encode(pipe, class_labels=classes)  # refuses a label before a folder is made
    settings = {
        "pipeline": str(pipeline.resolve()),
        "labels": numbers,
        "num_images_per_label": num_images_per_label,
        "num_inference_steps": num_inference_steps,
        "guider": None if rule is None else {"name": type(rule).__name__, **_plain(rule.config)},
        "seed": seed,
    }
    _claim(output, settings)
    paths = [output / str(int(y)) / f"{i:06d}.png" for i, y in enumerate(classes)]
    todo = [i for i, path in enumerate(paths) if not path.is_file()]
    config = pipe.transformer.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    with tqdm(total=len(classes), initial=len(classes) - len(todo), unit="image", disable=quiet or None) as bar:
        for start in range(0, len(todo), batch_size):
            items = todo[start : start + batch_size]
            rng = ItemRNG(seed, items)
            images = pipe(
                classes[items],
                num_inference_steps,
                guider=rule,
                latents=rng.normal(shape),
                generator=rng.generators(),
            ).images
            for i, image in zip(items, images, strict=True):
                paths[i].parent.mkdir(exist_ok=True)
                temporary = paths[i].with_suffix(".tmp")
                image.save(temporary, format="PNG")
                temporary.replace(paths[i])
            bar.update(len(items))
    rows = [
        {"file_name": str(path.relative_to(output)), "label": int(y), "item": i}
        for i, (path, y) in enumerate(zip(paths, classes, strict=True))
    ]
    (output / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _grid([Image.open(path) for path in paths[:400]], columns=max(10, num_images_per_label)).save(output / "grid.png")
    return output


def _claim(output: Path, settings: dict) -> None:
    """Refuse a folder that holds images of other settings, before anything is generated."""
    record = output / "settings.json"
    if record.is_file():
        there = json.loads(record.read_text(encoding="utf-8"))
        differs = [key for key in settings if there.get(key) != settings[key]]
        if differs:
            was = {key: there.get(key) for key in differs}
            raise ValueError(f"output={str(output)!r} holds images made with {was}; choose another folder")
        return
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"output={str(output)!r} is not empty and holds no settings.json of earlier samples")
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _plain(config) -> dict:
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _grid(images: list[Image.Image], columns: int) -> Image.Image:
    scale = max(1, 48 // images[0].width)
    w, h = images[0].width * scale, images[0].height * scale
    rows = -(-len(images) // columns)
    sheet = Image.new(images[0].mode, (columns * (w + 2) - 2, rows * (h + 2) - 2), "white")
    for i, image in enumerate(images):
        sheet.paste(image.resize((w, h), Image.Resampling.NEAREST), ((i % columns) * (w + 2), (i // columns) * (h + 2)))
    return sheet
