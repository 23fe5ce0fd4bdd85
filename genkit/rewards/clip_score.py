"""How well an image fits its prompt, by CLIP."""

from typing import Literal

from torch import Tensor

from genkit.rewards._clip import CLIPReward
from genkit.rewards._loading import NetworkConfig
from genkit.rewards.base import Prompts

PREFIX = "A photo depicts "


class CLIPScoreConfig(NetworkConfig):
    """``model``: a ``CLIPModel`` of transformers with its tokenizer.

    ``convention``: ``cosine``, that of papers on generation, or ``hessel``, that of the paper that named the score.
    """

    model: str = "openai/clip-vit-base-patch32"
    convention: Literal["cosine", "hessel"] = "cosine"


class CLIPScore(CLIPReward):
    """``100 cos(CLIP(image), CLIP(text))``, also where that is negative, so that there is a gradient everywhere.

    With ``convention="hessel"`` it is ``2.5 max(cos(CLIP(image), CLIP("A photo depicts " + text)), 0)`` of each image,
    called ``clip_score_hessel`` in results; torchmetrics cuts off, of the former, only the mean over all images.

    The scale is that of OpenAI's models; scores of different models are not comparable. Papers on generation use
    ViT-L/14, B/16 (MMHM) or B/32: the model belongs to the number.

    Source: CLIPScore, arXiv 2104.08718; Learning Transferable Visual Models From Natural Language Supervision, arXiv
    2103.00020.
    """

    Config = CLIPScoreConfig
    scale = (25.0, 35.0)
    license = "MIT"

    @property
    def called(self) -> str:
        return "clip_score_hessel" if self.config.convention == "hessel" else "clip_score"

    def factor(self) -> float:
        return 2.5 if self.config.convention == "hessel" else 100.0

    def score(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        if self.config.convention == "cosine":
            return super().score(images, prompts)
        return super().score(images, [PREFIX + str(prompt) for prompt in prompts or ()]).clamp(min=0)
