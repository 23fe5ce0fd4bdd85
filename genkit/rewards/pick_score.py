"""Which of several images for a prompt people would pick, by a CLIP tuned on half a million choices."""

from typing import Any

import torch
from torch import nn

from genkit.rewards._clip import CLIPReward, load_clip
from genkit.rewards._loading import NetworkConfig


class PickScoreConfig(NetworkConfig):
    """``tokenizer``: a Hub id or a folder; that of the model which was tuned."""

    model: str = "yuvalkirstain/PickScore_v1"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(CLIPReward):
    """``exp(logit_scale) cos(CLIP(image), CLIP(text))``, where ``exp(logit_scale)`` is about 100.

    Published thresholds below 1 are of the cosine: multiply them by 100.

    Source: Pick-a-Pic, arXiv 2305.01569.
    """

    Config = PickScoreConfig
    scale = (20.0, 26.0)

    def load(self) -> tuple[nn.Module, Any]:
        from transformers import AutoTokenizer

        model = load_clip(self.config, torch.float32)
        self.logit_scale = model.logit_scale.exp().item()  # bfloat16 would make 98.9 of 100
        return model.to(self.config.torch_dtype), AutoTokenizer.from_pretrained(self.config.tokenizer)

    def factor(self) -> float:
        return self.logit_scale
