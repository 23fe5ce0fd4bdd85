"""Pictures to tokens and back."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from PIL.Image import Image
from torch import Tensor

from genkit.networks.tokenizer import ImageTokenizer
from genkit.registry import unknown
from genkit.tokenizers import Tokenizer

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class TokenizerPipelineOutput(BaseOutput):
    """``images`` as they came out, and the ``tokens`` ``(B, h, w)`` between."""

    images: Any
    tokens: Tensor


class TokenizerPipeline(DiffusionPipeline):
    """Pictures, their tokens, and what is left of the pictures::

        pipe = TokenizerPipeline.from_pretrained("outputs/digits/tokenizer_fvq/pipeline")
        tokens = pipe.encode(images)
        images = pipe.decode(tokens)

    Args:
        vqvae: a :class:`genkit.networks.tokenizer.ImageTokenizer`.
    """

    network_class = ImageTokenizer
    student_class = Tokenizer
    model_cpu_offload_seq = "vqvae"

    def __init__(self, vqvae):
        super().__init__()
        self.register_modules(vqvae=vqvae)

    @cached_property
    def image_processor(self) -> VaeImageProcessor:
        """Pictures to tensors in [-1, 1] and back, without a change of size."""
        grey = self.vqvae.config["in_channels"] == 1
        return VaeImageProcessor(do_resize=False, do_convert_grayscale=grey, do_convert_rgb=not grey)

    @torch.no_grad()
    def encode(self, images: Any) -> Tensor:
        """Tokens ``(B, h, w)`` of pictures of one size, as ``diffusers.image_processor`` takes them."""
        return self.vqvae.encode(self._tensor(images)).indices

    @torch.no_grad()
    def decode(self, tokens: Tensor, size: tuple[int, int] | None = None, output_type: str = "pil") -> Any:
        """Pictures of tokens ``(B, h, w)``, or ``(B, N)`` of a square.

        Args:
            size: height and width to cut them to.
            output_type: ``pil``, ``np`` ``(B, H, W, C)`` in [0, 1], or ``pt`` ``(B, C, H, W)`` in [0, 1].

        Raises:
            ValueError: tokens out of range, another size or output type.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(unknown("output_type", output_type, OUTPUT_TYPES))
        pictures = self.vqvae.decode_tokens(tokens.to(self._execution_device), size).float().clamp(-1, 1)
        return self.image_processor.postprocess(pictures, output_type=output_type)

    @torch.no_grad()
    def __call__(self, images: Any, *, output_type: str = "pil", return_dict: bool = True):
        """What is left of ``images``, of one size.

        Raises:
            ValueError: another output type; pictures of several sizes.
        """
        pixels = self._tensor(images)
        tokens = self.vqvae.encode(pixels).indices
        out = self.decode(tokens, (pixels.shape[-2], pixels.shape[-1]), output_type)
        self.maybe_free_model_hooks()
        return TokenizerPipelineOutput(out, tokens) if return_dict else (out, tokens)

    def _tensor(self, images: Any) -> Tensor:
        sizes = {str(image.size) for image in images if isinstance(image, Image)} if isinstance(images, list) else ()
        if len(sizes) > 1:
            raise ValueError(f"images of sizes {', '.join(sorted(sizes))}: accepted are those of one size at a time")
        return self.image_processor.preprocess(images).to(self._execution_device, self.vqvae.dtype)
