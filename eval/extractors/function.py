"""An extractor of one's own: any Python callable, by its path."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit.eval.extractors._resized import state_hash
from genkit.eval.extractors.base import Extractor, Features, file_hash, function_extractor
from genkit.rewards.function import load_object


class FunctionExtractor(Extractor):
    """``name(images)``, of uint8 ``(B, C, H, W)`` as they are read, to ``(B, dim)``.

    Args:
        path: ``package.module:name`` or ``folder/file.py:name``. The file or module is executed: use code that you
            trust. A class is made once, without arguments; a module's weights are frozen and move with the extractor.
        dim: size of a feature.

    The ``id`` has the hash of the source file, and for a module that of its weights.

    Raises:
        ValueError: a path of another form, a file, module or name that is not there, or that cannot be called; another
            size of features than ``dim``.
    """

    def __init__(self, path: str, dim: int):
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim={dim!r}: expected a number of features, at least 1")
        made: Any = load_object(path)
        if isinstance(made, type):
            with torch.random.fork_rng(devices=[]):
                made = made()
        if not callable(made):
            raise ValueError(f"path={path} is a {type(made).__name__}; accepted is what can be called")
        hashes = [file_hash(file)] if (file := _source(path)).is_file() else []
        if isinstance(made, nn.Module):
            made.eval().requires_grad_(False)
            hashes.append(state_hash(made.state_dict()))
        self.dim = dim
        self.id = "/".join([f"function-{path.rpartition('/')[2]}", "no-resize", "-".join(hashes) or "no-source"])
        self._made = made
        self._call = function_extractor(made, dim, self.id)

    def to(self, device: torch.device | str) -> "FunctionExtractor":
        if isinstance(self._made, nn.Module):
            self._made.to(device)
        return self

    def __call__(self, images: Tensor) -> Features:
        return self._call(images)


def _source(path: str) -> Path:
    """The file that ``path`` is in; of a module that is built in, none that exists."""
    source = path.rpartition(":")[0]
    if source.endswith(".py"):
        return Path(source).expanduser()
    spec = importlib.util.find_spec(source)
    return Path(spec.origin if spec and spec.origin else source)
