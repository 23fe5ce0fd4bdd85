"""Classifiers of generated images: by class, and by which of several prompts CLIP finds nearest."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageClassifier(nn.Module):
    """Logits of images in [-1, 1] by a network that wants them of one size and normalised.

    Args:
        model: ``(B, 3, H, W)`` to logits ``(B, K)``, or to an output that has them as ``logits`` (transformers).
        size: ``(H, W)`` in pixels; images are resized to it (bicubic, antialiased), not cropped.
        mean, std: of the channels, for values in [0, 1].
    """

    def __init__(self, model: nn.Module, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self.size, self.mean, self.std = tuple(size), tuple(mean), tuple(std)

    @classmethod
    def from_pretrained(cls, name_or_path: str, **kwargs) -> "ImageClassifier":
        """A classifier of transformers and its preprocessing, from the Hub or a folder.

        ``kwargs`` go to ``AutoModelForImageClassification.from_pretrained``.
        """
        from transformers import AutoModelForImageClassification
        from transformers.utils import cached_file

        model = AutoModelForImageClassification.from_pretrained(name_or_path, **kwargs)
        # Read as a file: transformers' own image processors need torchvision.
        settings = json.loads(Path(cached_file(name_or_path, "preprocessor_config.json")).read_text(encoding="utf-8"))
        size: Any = settings.get("crop_size") or settings["size"]
        if isinstance(size, dict):
            side = size.get("shortest_edge")
            size = (size.get("height", side), size.get("width", side))
        elif isinstance(size, int):
            size = (size, size)
        return cls(model, size, settings["image_mean"], settings["image_std"]).eval()

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3 or 1, h, w)`` in [-1, 1], clipped to it, to logits ``(B, K)`` in float32."""
        output = self.model(_prepared(images, self.size, self.mean, self.std, self.model))
        return (output if isinstance(output, Tensor) else output.logits).float()


class PromptClassifier(nn.Module):
    """``logit_scale cos(CLIP(image), CLIP(prompt_k))`` of images in [-1, 1], for a fixed list of prompts.

    Args:
        model: transformers' ``CLIPModel``.
        tokenizer: its tokenizer.
        prompts: ``K`` texts, embedded once, here.
        logit_scale: 100 is what OpenAI's models were trained up to.

    Raises:
        ValueError: no prompts.
    """

    embeddings: Tensor

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[str], logit_scale: float = 100.0):
        super().__init__()
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r}: accepted is a list of texts, at least one")
        self.model = model
        self.logit_scale = logit_scale
        side = model.config.vision_config.image_size
        self.size = (side, side)
        tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(model.device)
        with torch.no_grad():
            texts = model.text_projection(model.text_model(**tokens).pooler_output)
        self.register_buffer("embeddings", F.normalize(texts.float(), dim=1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3 or 1, h, w)`` in [-1, 1], clipped to it, to logits ``(B, K)`` in float32."""
        pixels = _prepared(images, self.size, CLIP_MEAN, CLIP_STD, self.model)
        seen = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return self.logit_scale * F.normalize(seen.float(), dim=1) @ self.embeddings.T


def _prepared(images: Tensor, size, mean, std, model: nn.Module) -> Tensor:
    """Images in [-1, 1] as ``model`` wants them, in its dtype."""
    images = images.float().clamp(-1, 1).expand(-1, len(mean), -1, -1)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    centre, width = (images.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
    dtype = next((p.dtype for p in model.parameters()), images.dtype)
    return (((images + 1) / 2).clamp(0, 1) - centre).div(width).to(dtype)
