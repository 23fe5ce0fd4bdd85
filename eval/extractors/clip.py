"""CLIP: image embeddings, those of CMMD by default."""

from typing import Any

from torch import Tensor

from genkit.eval.extractors import _hub
from genkit.eval.extractors._resized import ResizedExtractor, check_rule, state_hash
from genkit.eval.extractors.base import Features
from genkit.networks.image_classifiers import CLIP_MEAN, CLIP_STD
from genkit.rewards._preprocessing import normalised

LARGE = (1024, 24, 14, 336)


class CLIPExtractor(ResizedExtractor):
    """Projected image embeddings, not normalised (CMMD does that), of the centre square brought to the model's size.

    Args:
        model: transformers' ``CLIPModel``, a folder or a Hub id; CMMD's is ViT-L/14 at 336 pixels. Frechet distances
            are called ``fd_clip`` with it, and with others by their size too: ``fd_clip[768x12/32@224]`` is of width
            768, 12 layers and patches of 32 pixels.
        resize: a rule of :mod:`genkit.eval.resize`; ``pil`` is CMMD's.
        download: fetch ``model`` from the Hub if it is not here.

    Raises:
        ValueError: a model that is not here (with the command that fetches it), or none of CLIP.

    Source: Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation", arXiv
    2401.09603.
    """

    usual = "pil"
    network: Any  # transformers' CLIPModel

    def __init__(self, model: str = "openai/clip-vit-large-patch14-336", resize: str = "pil", download: bool = False):
        from transformers import CLIPModel

        check_rule(resize)
        network = _hub.load(CLIPModel, model, download)
        vision = network.config.vision_config
        del network.text_model, network.text_projection
        kind = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size)
        size = "{}x{}/{}@{}".format(*kind)
        self.dim = network.config.projection_dim
        super().__init__(
            network,
            name=f"clip-{size.replace('/', '-')}",
            weights=state_hash(network.state_dict()),
            distance="fd_clip" if kind == LARGE else f"fd_clip[{size}]",
            size=vision.image_size,
            resize=resize,
        )

    def prepare(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return images[..., top : top + side, left : left + side]

    def see(self, pixels: Tensor) -> Features:
        # By its parts, since what get_image_features returns depends on the version of transformers.
        pixels = normalised(pixels / 255, CLIP_MEAN, CLIP_STD)
        pooled = self.network.vision_model(pixel_values=pixels).pooler_output
        return Features(self.network.visual_projection(pooled))
