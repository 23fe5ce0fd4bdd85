"""Which image people prefer for a prompt, by a BLIP that reads the prompt while it looks."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.rewards import _blip
from genkit.rewards._clip import preprocessing
from genkit.rewards._loading import NetworkConfig, folded, from_state, part, read_weights
from genkit.rewards.base import Prompts, Reward

_LENGTH = 35  # tokens of a prompt
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on its training data


class ImageRewardConfig(NetworkConfig):
    """``model``: a Hub id or folder with ``ImageReward.pt``, or a file of that form (also ``.safetensors``).
    ``tokenizer``: a Hub id or a folder; BERT's.
    """

    model: str = "THUDM/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"


class ImageReward(Reward):
    """``(h(BERT(text | ViT(image))[CLS]) - 0.167) / 1.033``: about normally distributed over images of its time.

    The text, cut to 35 tokens, attends to the image by cross-attention; ``h`` is five linear layers without
    activations, hence affine. As the only reward it corrupts images in long trainings.

    Published weights are those of BLIP's own code, and become ``BlipVisionModel`` and ``BlipTextModel`` of transformers
    here. That the conversion is right is tested on small random models of the published layout; figures published for
    the weights themselves have not been reproduced.

    Source: ImageReward, arXiv 2304.05977; BLIP, arXiv 2201.12086.

    Raises:
        ValueError: weights of another form.
    """

    Config = ImageRewardConfig
    takes = "prompts"
    scale = (-1.0, 2.0)
    license = "Apache-2.0"
    weight: Tensor
    bias: Tensor
    vision_model: Any  # transformers'

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        from transformers import AutoTokenizer, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.tokenizer = AutoTokenizer.from_pretrained(self.config.tokenizer)
        state, dtype = read_weights(self.config.model, "ImageReward.pt", self.config.revision), self.config.torch_dtype
        seen, read = part(state, "blip.visual_encoder."), part(state, "blip.text_encoder.")
        try:
            vision, text = _blip.vision_config(seen), _blip.text_config(read)
        except KeyError as error:
            raise ValueError(
                f"model={self.config.model} has no {error}; accepted are weights of ImageReward"
            ) from error
        self.vision_model = from_state(BlipVisionModel, vision, _blip.vision_weights(seen), dtype)
        self.text_model = from_state(BlipTextModel, text, _blip.text_weights(read), dtype, add_pooling_layer=False)
        weight, bias = folded(part(state, "mlp."))
        self.register_buffer("weight", weight / _STD, persistent=False)
        self.register_buffer("bias", (bias - _MEAN) / _STD, persistent=False)
        # Its code crops with torchvision, which rounds half a pixel otherwise than transformers do.
        self.preprocess = preprocessing(self.config, vision.image_size, half=round)

    def score(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        options = dict(padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="pt")
        tokens = self.tokenizer(list(prompts), **options).to(images.device)  # type: ignore[arg-type]  # takes = "prompts"
        pixels = self.preprocess(images).to(self.vision_model.dtype)
        seen = self.vision_model(pixel_values=pixels).last_hidden_state
        read = self.text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state[:, 0]
        read = read.to(torch.promote_types(read.dtype, torch.float32))
        return F.linear(read, self.weight.to(read)[None], self.bias.to(read))[:, 0]
