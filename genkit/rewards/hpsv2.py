"""What people prefer, by a CLIP tuned on the Human Preference Dataset v2."""

from functools import partial
from typing import Any, Literal

from torch import nn

from genkit.rewards._clip import CLIPReward
from genkit.rewards._loading import NetworkConfig, from_state, read_weights
from genkit.rewards._open_clip import clip_config, converted
from genkit.rewards._preprocessing import fitted, padded

_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
_SCALES = {"v2.0": (0.26, 0.29), "v2.1": (0.25, 0.41)}


class HPSv2Config(NetworkConfig):
    """``model``: a Hub id or folder with the published file, or a file of that form (also ``.safetensors``).
    ``version``: ``v2.0`` or ``v2.1``. ``tokenizer``: a Hub id or a folder; that of the model which was tuned.
    """

    model: str = "xswu/HPSv2"
    version: Literal["v2.0", "v2.1"] = "v2.1"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HPSv2(CLIPReward):
    """``cos(CLIP(image), CLIP(text))``, of the whole image in a black square.

    Scores compare images for one prompt, and those of the two versions do not compare. The benchmark reports them times
    100. Published weights are OpenCLIP's, and become transformers' here.

    Source: Human Preference Score v2, arXiv 2306.09341.

    Raises:
        ValueError: weights of another form; before any work, an image so narrow that nothing is left of it.
    """

    Config = HPSv2Config
    license = "Apache-2.0"

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.scale = _SCALES[self.config.version]

    def load(self) -> tuple[nn.Module, Any]:
        from transformers import AutoTokenizer, CLIPModel

        tokenizer = AutoTokenizer.from_pretrained(self.config.tokenizer)
        state = read_weights(self.config.model, _FILES[self.config.version], self.config.revision)
        # Heads are 80 wide in the ViT-H that looks and 64 in the transformer that reads.
        config = clip_config(state, vision_head=80, text_head=64, end=tokenizer.eos_token_id)
        return from_state(CLIPModel, config, converted(state), self.config.torch_dtype), tokenizer

    def preprocessing(self, size: int) -> Any:
        return partial(padded, size=size, antialias=self.config.antialias, quantise=self.config.quantise)

    def check_size(self, shape: tuple[int, ...]) -> None:
        size = self.model.config.vision_config.image_size
        height, width = shape[-2:]
        if min(fitted(height, width, size)) < 1:
            raise ValueError(
                f"hpsv2: images of {height} x {width} pixels; nothing is left when the longer side is {size}"
            )
