"""DINOv2: the features of FD-DINOv2."""

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.eval.extractors import _hub
from genkit.eval.extractors._resized import ResizedExtractor, check_rule, state_hash
from genkit.eval.extractors.base import Features
from genkit.rewards._preprocessing import normalised

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
LARGE = (1024, 24, 14)


class DINOv2Extractor(ResizedExtractor):
    """The class token after the last norm, of whole images brought to 224 x 224.

    Args:
        model: transformers' ``Dinov2Model``, a folder or a Hub id. Distances are called ``fd_dinov2`` with ViT-L/14,
            and with others by their size too: ``fd_dinov2[384x12/14]`` is of width 384 and 12 layers.
        resize: a rule of :mod:`genkit.eval.resize`: ``bicubic`` is EDM2's, ``pil`` that of dgm-eval.
        download: fetch ``model`` from the Hub if it is not here.

    Positions are interpolated as torch.hub's model does, which those two use: transformers would place them up to a
    quarter of a patch aside.

    Raises:
        ValueError: a model that is not here (with the command that fetches it), or none of DINOv2.

    Source: Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of
    diffusion models", arXiv 2306.04675.
    """

    usual = "bicubic"

    def __init__(self, model: str = "facebook/dinov2-large", resize: str = "bicubic", download: bool = False):
        from transformers import Dinov2Model

        check_rule(resize)
        network = _hub.load(Dinov2Model, model, download)
        config = network.config
        digest = state_hash(network.state_dict())
        places = network.embeddings.position_embeddings
        places.data = positions(places.data, SIDE // config.patch_size)
        kind = (config.hidden_size, config.num_hidden_layers, config.patch_size)
        size = "{}x{}/{}".format(*kind)
        self.dim = config.hidden_size
        super().__init__(
            network,
            name=f"dinov2-{size.replace('/', '-')}",
            weights=digest,
            distance="fd_dinov2" if kind == LARGE else f"fd_dinov2[{size}]",
            size=SIDE,
            resize=resize,
        )

    def see(self, pixels: Tensor) -> Features:
        return Features(self.network(pixel_values=normalised(pixels / 255, MEAN, STD)).pooler_output)


def positions(embeddings: Tensor, side: int) -> Tensor:
    """Position embeddings ``(1, 1 + m m, d)`` for ``side`` x ``side`` patches, as in torch.hub's DINOv2.

    Bicubic by a scale of ``(side + 0.1) / m``: the 0.1 was to be safe from rounding, but moves the grid.
    """
    token, grid = embeddings[:, :1], embeddings[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side:
        return embeddings
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], 1)
