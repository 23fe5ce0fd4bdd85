"""Which of several images for a prompt people would pick, by a CLIP tuned on half a million choices."""

from typing import Any

from torch import Tensor, nn

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

        return load_clip(self.config), AutoTokenizer.from_pretrained(self.config.tokenizer)

    def factor(self) -> Tensor:
        return self.model.logit_scale.float().exp()  # type: ignore[operator, union-attr]  # a parameter
