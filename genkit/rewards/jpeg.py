"""How small a file an image makes."""

import io
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from genkit.rewards.base import Prompts, Reward, RewardConfig


class JPEGConfig(RewardConfig):
    """``quality``: of the encoder."""

    quality: int = Field(95, ge=1, le=100)


class JPEG(Reward):
    """Minus the kilobytes (1000 bytes) of the image as a JPEG file; with a negative weight it rewards detail.

    Not differentiable.

    Source: Training Diffusion Models with Reinforcement Learning, arXiv 2305.13301, section 5.1.
    """

    Config = JPEGConfig
    differentiable = False

    def score(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        pixels = (images.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
        return torch.tensor([-self._bytes(image.numpy()) / 1000 for image in pixels], device=images.device)

    def _bytes(self, image: Any) -> int:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
            file, "JPEG", quality=self.config.quality
        )
        return len(file.getvalue())
