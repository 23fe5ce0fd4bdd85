"""Networks of transformers for extractors: from this machine, and from the Hub only where that is asked for."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from genkit._files import first_line


def load(cls: Any, model: str, download: bool) -> Any:
    """``cls.from_pretrained(model)`` in float32; ``model`` is a folder or a Hub id.

    Raises:
        ValueError: it is not here (with the command that fetches it), cannot be read, is of another kind than ``cls``,
            or lacks weights.
    """
    from transformers import AutoConfig

    is_folder = Path(model).expanduser().is_dir()
    if is_folder and download:
        raise ValueError(f"download=True, but model={model} is a folder; accepted with it is a Hub id")
    where = str(Path(model).expanduser()) if is_folder else model
    options: dict[str, Any] = {"local_files_only": not download}
    wanted = cls.config_class.model_type
    try:
        found = AutoConfig.from_pretrained(where, **options).model_type
        if found != wanted:
            raise ValueError(f"model={model} is a model of type {found!r}; accepted is {wanted!r}")
        with torch.random.fork_rng(devices=[]):  # weights that are missing would be drawn, before we can say so
            network, info = cls.from_pretrained(where, dtype=torch.float32, output_loading_info=True, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_folder or download:
            raise ValueError(f"model={model} cannot be loaded: {first_line(error)}") from error
        raise ValueError(
            f"model={model} is not on this machine. Fetch it with\n  hf download {model}\nor set download=True"
        ) from error
    if info["missing_keys"]:
        raise ValueError(f"model={model} lacks weights, {sorted(info['missing_keys'])[0]!r} the first")
    return network
