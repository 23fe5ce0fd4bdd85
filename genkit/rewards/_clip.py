"""What the rewards of the CLIP family share: two towers and a cosine."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.rewards._loading import NetworkConfig
from genkit.rewards._preprocessing import Preprocessing
from genkit.rewards.base import Prompts, Reward


def load_clip(config: NetworkConfig, dtype: torch.dtype | None = None) -> Any:
    """transformers' ``CLIPModel`` of the settings, or in another ``dtype``."""
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(config.model, revision=config.revision, dtype=dtype or config.torch_dtype)


def preprocessing(config: NetworkConfig, size: int, **options: Any) -> Preprocessing:
    """CLIP's: shorter side to ``size``, crop of the centre."""
    return Preprocessing(size, (size, size), antialias=config.antialias, quantise=config.quantise, **options)


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """Unit vectors ``(B, D)`` of normalised pixels, in float32 at least."""
    # By its parts, since what get_image_features returns depends on the version of transformers.
    seen = model.visual_projection(model.vision_model(pixel_values=pixels.to(model.dtype)).pooler_output)
    return _unit(seen)


def text_features(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Unit vectors ``(B, D)`` of texts, cut to what the model takes with the end-of-text token kept."""
    length = model.config.text_config.max_position_embeddings
    # Always the full length, so that a text's features do not depend on its neighbours'.
    options = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    tokens = tokenizer(list(texts), **options).to(model.device)
    read = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return _unit(model.text_projection(read))


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1, eps=1e-12)


class CLIPReward(Reward):
    """A multiple of ``cos(CLIP(image), CLIP(text))``: a subclass says of which, and of which model."""

    Config = NetworkConfig
    takes = "prompts"
    model: Any  # transformers' CLIPModel

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.model, self.tokenizer = self.load()
        self.preprocess = self.preprocessing(self.model.config.vision_config.image_size)

    def load(self) -> tuple[nn.Module, Any]:
        """A ``CLIPModel`` and its tokenizer."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.config.model, revision=self.config.revision)
        return load_clip(self.config), tokenizer

    def preprocessing(self, size: int) -> Any:
        """From images to the model's pixels, ``size`` wide and high."""
        return preprocessing(self.config, size)

    def factor(self) -> float:
        """What the cosine is multiplied by."""
        return 1.0

    def score(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        seen = image_features(self.model, self.preprocess(images))
        wanted = text_features(self.model, self.tokenizer, prompts)  # type: ignore[arg-type]  # takes = "prompts"
        return self.factor() * (seen * wanted).sum(1)
