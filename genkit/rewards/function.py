"""A reward of one's own: any Python callable."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.registry import unknown
from genkit.rewards.base import Prompts, Reward, RewardConfig


class FunctionConfig(RewardConfig):
    """``path``: ``package.module:name`` or ``folder/file.py:name``. ``differentiable``: whether gradients reach the
    images. ``takes``: ``prompts`` or ``labels``, or neither. ``settings``: for the callable.
    """

    path: str
    differentiable: bool
    takes: Literal["prompts", "labels"] | None = None
    settings: dict[str, Any] = {}


class Function(Reward):
    """``name(images, **settings)``, or ``name(images, prompts, **settings)`` where it ``takes`` them.

    ``images`` are ``(B, C, H, W)`` on [0, 1]; what comes back is a number each. A class is made once, with the
    settings, and called without; weights of one that is a module are frozen and move with the reward.

    The file or module is executed: use code that you trust.

    Raises:
        ValueError: a path of another form, a file, module or name that is not there; from a differentiable one, values
            without a gradient where one is asked.
    """

    Config = FunctionConfig

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.differentiable, self.takes = self.config.differentiable, self.config.takes
        made = load_object(self.config.path)
        self.settings = self.config.settings
        if isinstance(made, type):
            made, self.settings = made(**self.settings), {}
        if not callable(made):
            raise ValueError(f"path={self.config.path} is a {type(made).__name__}; accepted is what can be called")
        self.call = made

    def score(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        given = (images if self.differentiable else images.detach(),) if self.takes is None else (images, prompts)
        rewards = torch.as_tensor(self.call(*given, **self.settings), device=images.device)
        if self.differentiable and torch.is_grad_enabled() and images.requires_grad and not rewards.requires_grad:
            raise ValueError(f"path={self.config.path} is said to be differentiable, but no gradient comes out of it")
        return rewards


def load_object(path: str) -> Any:
    """What ``path``, ``package.module:name`` or ``folder/file.py:name``, names; the file or module is executed.

    Raises:
        ValueError: a path of another form, a file, module or name that is not there.
    """
    source, colon, name = path.rpartition(":")
    if not colon or not source or not name:
        raise ValueError(f"path={path!r}: accepted are package.module:name and folder/file.py:name")
    if source.endswith(".py"):
        file = Path(source).expanduser()
        if not file.is_file():
            raise ValueError(f"path={path!r}: there is no file {file}")
        spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
        assert spec is not None and spec.loader is not None  # a name that ends in .py has a loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise ValueError(f"path={path!r}: {error}") from error
    if not hasattr(module, name):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(unknown("path", path, [f"{source}:{key}" for key in names if not key.startswith("_")]))
    return getattr(module, name)
