"""What a reward is: one number for every image, and whether one can differentiate it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

Prompts = Sequence[str] | Tensor
"""What images were asked for: texts, or class labels ``(B,)``."""


class RewardConfig(BaseModel):
    """Settings of a reward; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Reward(nn.Module, ABC):
    """``reward(images, prompts) -> (B,)``, float32: how good each image is, each by itself.

    A subclass in its own file of ``genkit/rewards/`` is a reward named like the file. It names its settings in
    ``Config`` and defines :meth:`score`; weights that it loads are frozen, in eval mode, and move with ``to``.

    Attributes:
        differentiable: whether gradients reach the images; asking for them otherwise is an error.
        takes: ``prompts`` where it reads texts, ``labels`` where it reads class labels, ``None`` for images alone.
        scale: the values between which common models score; for plots and thresholds.
        license: of the weights, where known.
    """

    Config: ClassVar[type[BaseModel]] = RewardConfig
    config: Any  # an instance of Config
    differentiable: bool = True
    takes: Literal["prompts", "labels"] | None = None
    scale: tuple[float, float] | None = None
    license: str | None = None

    def __init__(self, **settings: Any):
        super().__init__()
        self.config = self.Config(**settings)

    @property
    def called(self) -> str:
        """What results call it: the name of the file it is defined in."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def score(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        """``(B,)`` of ``images`` ``(B, C, H, W)``, float32 on [0, 1], with a gradient if ``differentiable``."""

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Told of the images' shape ``(C, H, W)`` before any work; raises if it cannot take them."""
        return

    def train(self, mode: bool = True) -> "Reward":
        """Stays in eval mode: training and evaluation see one reward, without dropout."""
        return super().train(False)

    def forward(self, images: Tensor, prompts: Prompts | None = None) -> Tensor:
        """The reward of every image, float32 ``(B,)``.

        Args:
            images: ``(B, C, H, W)``, floating point on [0, 1]; ``C`` 3, or 1 for grey.
            prompts: what each was asked for, where the reward ``takes`` it.

        Raises:
            ValueError: images or prompts of another form, or of different numbers; a gradient asked of a reward that
                has none.
        """
        name = type(self).__name__
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise ValueError(
                f"{name}: images of shape {tuple(images.shape)} and type {images.dtype}; accepted are floats "
                "(B, 3 or 1, H, W) on [0, 1]"
            )
        if not self.differentiable and torch.is_grad_enabled() and images.requires_grad:
            raise ValueError(
                f"{name} is not differentiable, and a gradient is asked of it; use it as a held-out reward, or as the "
                "scorer of objective=dro or diffusion_dpo"
            )
        self._check_prompts(prompts, len(images))
        with torch.autocast(images.device.type, enabled=False):
            rewards = self.score(images.float() if images.dtype.itemsize < 4 else images, prompts)
        if rewards.shape != (len(images),):
            raise ValueError(f"{name} gives {tuple(rewards.shape)} for {len(images)} images, wanted ({len(images)},)")
        return rewards if rewards.dtype == torch.float64 else rewards.float()

    def _check_prompts(self, prompts: Prompts | None, batch: int) -> None:
        if self.takes is None:
            return
        wanted = "a list of texts" if self.takes == "prompts" else "class labels (B,)"
        if prompts is None or isinstance(prompts, Tensor) != (self.takes == "labels") or isinstance(prompts, str):
            raise ValueError(f"{type(self).__name__}: prompts={type(prompts).__name__}; accepted is {wanted}")
        if len(prompts) != batch:
            raise ValueError(f"{type(self).__name__}: {len(prompts)} prompts for {batch} images; accepted is one each")
