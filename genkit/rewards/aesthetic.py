"""How pretty people find an image, by a linear readout of CLIP."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from genkit.rewards._clip import image_features, load_clip, preprocessing
from genkit.rewards._loading import NetworkConfig, folded, read_weights
from genkit.rewards.base import Prompts, Reward


class AestheticConfig(NetworkConfig):
    """``model``: the CLIP model. ``head``: the file ``sac+logos+ava1-l14-linearMSE.pth`` or one of its form, or a Hub
    id or folder that has it as ``aesthetic-model.pth``.
    """

    model: str = "openai/clip-vit-large-patch14"
    head: str = "trl-lib/ddpo-aesthetic-predictor"


class Aesthetic(Reward):
    """``w . CLIP(image) + b`` with the features at length 1: marks from 1 to 10.

    The published head is five linear layers without activations, hence one vector and one number. Its training data
    prefer paintings and smooth faces, and so do models that are tuned on it alone.

    Source: LAION-Aesthetics v2, github.com/christophschuhmann/improved-aesthetic-predictor.

    Raises:
        ValueError: a head that is not affine layers in a row, or for features of another width.
    """

    Config = AestheticConfig
    scale = (5.0, 7.0)
    weight: Tensor
    bias: Tensor

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        weight, bias = folded(read_weights(self.config.head, "aesthetic-model.pth"))
        self.model = load_clip(self.config)
        self.model.text_model = None
        width = self.model.config.projection_dim
        if len(weight) != width:
            raise ValueError(
                f"head={self.config.head} reads {len(weight)} features; model={self.config.model} has {width}"
            )
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.preprocess = preprocessing(self.config, self.model.config.vision_config.image_size)

    def score(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        features = image_features(self.model, self.preprocess(images))
        return F.linear(features, self.weight.to(features)[None], self.bias.to(features))[:, 0]
