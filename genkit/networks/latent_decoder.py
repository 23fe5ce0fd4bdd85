"""Latents to images, for whatever looks at images on the way."""

import math

import torch
from torch import Tensor, nn

from genkit.denoisers.flux import unpack
from genkit.latents import unstandardise


class LatentDecoder(nn.Module):
    """Predicted clean latents, as networks see them, to images, nominally in [-1, 1].

    Latents are ``(B, C, H, W)``, or ``(B, N, 4 C)`` as Flux packs them.

    Args:
        vae: an autoencoder of Diffusers; ``AutoencoderTiny`` is enough for a classifier.
        height, width: of the images in pixels; needed for packed latents of images that are not square.

    Raises:
        ValueError: a VAE that overflows in the float16 that it is in; packed latents of a size that is not known.
    """

    def __init__(self, vae, height: int | None = None, width: int | None = None):
        super().__init__()
        if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            raise ValueError(
                f"vae={type(vae).__name__} in float16 with force_upcast overflows: give a copy in float32 or bfloat16, "
                "or AutoencoderTiny"
            )
        self.vae = vae
        self.height, self.width = height, width

    def forward(self, latents: Tensor) -> Tensor:
        if latents.ndim == 3:
            latents = unpack(latents, *self._size(latents.shape[1]))
        return self.vae.decode(unstandardise(self.vae, latents).to(self.vae.dtype), return_dict=False)[0]

    def _size(self, tokens: int) -> tuple[int, int]:
        """Height and width of the latents that were packed into ``tokens``."""
        if self.height is None or self.width is None:
            side = 2 * math.isqrt(tokens)
            size = (side, side)
        else:
            patch = 2 ** len(self.vae.config.block_out_channels)  # pixels a side
            size = (2 * (self.height // patch), 2 * (self.width // patch))
        if size[0] * size[1] != 4 * tokens:
            raise ValueError(
                f"height={self.height}, width={self.width} for {tokens} packed latents: give the pixels of the image"
            )
        return size
