"""Save, load, share: flow-map students, portable pipelines, model cards."""

import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

import genkit
from genkit._bundle import closure, code_file
from genkit._files import read_json, written
from genkit._flow_map_files import load_flow_map, save_flow_map

__all__ = ["load_flow_map", "model_card", "push_to_hub", "save_flow_map", "save_portable"]


def save_portable(pipe: DiffusionPipeline, folder: str | Path, *, card: Any = None) -> Path:
    """Save ``pipe`` so that it loads where genkit is not installed.

    ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` is enough there: the code of every class that
    is neither Diffusers' nor transformers' lies beside the weights, one file a class.

    Args:
        folder: new, or made by an earlier call.
        card: written as ``README.md``; by default :func:`model_card` with what the pipeline itself says.

    Raises:
        ValueError: a class whose code cannot be shipped in one file.
    """
    folder = Path(folder)
    own = {name: part for name, part in pipe.components.items() if part is not None and _is_own(type(part))}
    classes = [type(part) for part in own.values()] + ([type(pipe)] if _is_own(type(pipe)) else [])
    sources = closure(classes)  # before anything is written: it may refuse
    with written(folder) as part_folder:
        pipe.save_pretrained(str(part_folder))
        index = read_json(part_folder / "model_index.json")
        for name, part in own.items():
            library = type(part).__module__.replace(".", "_")
            index[name] = [library, type(part).__name__]
            (part_folder / name / f"{library}.py").write_text(code_file(type(part), sources), encoding="utf-8")
        if _is_own(type(pipe)):
            index["_class_name"] = ["pipeline", type(pipe).__name__]
            (part_folder / "pipeline.py").write_text(code_file(type(pipe), sources), encoding="utf-8")
        (part_folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        requirements = [f"{name}>={metadata.version(name)}" for name in ("diffusers", "torch", "transformers")]
        (part_folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
        card = card or model_card(
            type(pipe).__name__, {name: type(part).__name__ for name, part in pipe.components.items()}
        )
        (part_folder / "README.md").write_text(str(card), encoding="utf-8")
    return folder


def _is_own(cls: type) -> bool:
    return cls.__module__.split(".")[0] not in ("diffusers", "transformers")


# -- cards and sharing --------------------------------------------------------------------------------------------

_CARD = """---
{{ card_data }}
---

# {{ title }}

{{ description }}

## Use

```python
{{ code }}
```

## Configuration

```json
{{ config }}
```
{% if metrics %}
## Metrics

| metric | value |
|---|---|
{% for name, value in metrics.items() %}| {{ name }} | {{ value }} |
{% endfor %}{% endif %}
Made with genkit {{ version }}.
"""

_CODE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{location}", trust_remote_code=True)"""


def model_card(
    method: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    code: str | None = None,
    *,
    title: str | None = None,
    description: str = "",
    license: str | None = None,
    base_model: str | None = None,
    tags: tuple[str, ...] = (),
):
    """A ``huggingface_hub.ModelCard`` with method, configuration, metrics and a code example.

    Args:
        method: what made the model; also a tag.
        config: anything JSON takes.
        metrics: by name.
        code: how to use it; by default the line that loads a portable folder.
        license: of the weights, where that is known: what is trained from others' weights keeps theirs.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        license=license, library_name="diffusers", base_model=base_model, tags=["genkit", method.lower(), *tags]
    )
    return ModelCard.from_template(
        data,
        template_str=_CARD,
        title=title or method,
        description=description or f"Method: {method}.",
        code=code or _CODE.format(location="."),
        config=json.dumps(dict(config), indent=2, default=str),
        metrics={k: f"{v:.4g}" if isinstance(v, float) else v for k, v in (metrics or {}).items()},
        version=genkit.__version__,
    )


def push_to_hub(
    folder_or_model: str | Path | Any,
    repo_id: str,
    *,
    folder: str | Path | None = None,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload with genkit",
) -> str:
    """Save first, push second; the address of the commit.

    Args:
        folder_or_model: a folder, a pipeline (saved portable) or anything with ``save_pretrained``.
        repo_id: ``owner/name``.
        folder: where a model is saved; by default ``name`` in the working folder.

    Raises:
        ValueError: a ``repo_id`` of another form.
        FileNotFoundError: no such folder.
        ConnectionError: the Hub was not reached or refused; what was saved stays.
    """
    if not re.fullmatch(r"[\w-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id={repo_id!r}: accepted is owner/name")
    if isinstance(folder_or_model, (str, Path)):
        local = Path(folder_or_model)
        if not local.is_dir():
            raise FileNotFoundError(f"{local} is no folder; nothing was pushed")
    else:
        local = Path(folder or repo_id.split("/")[1])
        save = save_portable if isinstance(folder_or_model, DiffusionPipeline) else _save_pretrained
        save(folder_or_model, local)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # Offline mode and refusals are OSErrors; a lost connection is whatever the HTTP library in use raises.
    unreachable: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=local, commit_message=commit_message))
    except unreachable as error:
        raise ConnectionError(
            f"could not push to {repo_id}: {error}\nEverything is saved in {local}; push it later with "
            f"genkit.hub.push_to_hub({str(local)!r}, {repo_id!r})"
        ) from error


def _save_pretrained(model, folder: Path) -> None:
    model.save_pretrained(str(folder))
