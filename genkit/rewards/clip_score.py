"""How well an image fits its prompt, by CLIP."""

from genkit.rewards._clip import CLIPReward
from genkit.rewards._loading import NetworkConfig


class CLIPScoreConfig(NetworkConfig):
    """``model``: a ``CLIPModel`` of transformers with its tokenizer."""

    model: str = "openai/clip-vit-base-patch32"


class CLIPScore(CLIPReward):
    """``100 cos(CLIP(image), CLIP(text))``, also where that is negative, so that there is a gradient everywhere.

    The scale is that of OpenAI's models; scores of different models are not comparable.

    Source: CLIPScore, arXiv 2104.08718, which clips at 0 and multiplies by 2.5; Learning Transferable Visual Models
    From Natural Language Supervision, arXiv 2103.00020.
    """

    Config = CLIPScoreConfig
    scale = (25.0, 35.0)
    license = "MIT"

    def factor(self) -> float:
        return 100.0
