"""Class-conditional pictures from an autoregressive network, a token after the other."""

import hashlib
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from genkit.autoregressive import Autoregressive
from genkit.networks.gpt import GPT
from genkit.pipelines.base import PipelineOutput
from genkit.token_sampling import TokenSampling


def fingerprint(tokenizer) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a tokenizer's codes."""
    codes = tokenizer.quantizer.codebook().detach().float().cpu().contiguous()
    return hashlib.sha256(codes.numpy().tobytes()).hexdigest()[:12]


class AutoregressivePipeline(DiffusionPipeline):
    """Pictures of given classes from :class:`genkit.networks.gpt.GPT`, token after token.

    Args:
        transformer: the network.
        vqvae: the tokenizer whose tokens they are; without one they are grey levels.
        codebook: what the tokenizer's codes were when the network was trained on them, filled in by itself.

    Raises:
        ValueError: a tokenizer with another number of codes than the network has tokens, or with other codes.
    """

    network_class = GPT
    student_class = Autoregressive
    sampling_class = TokenSampling
    model_cpu_offload_seq = "transformer->vqvae"

    _optional_components = ["vqvae"]

    def __init__(self, transformer, vqvae=None, codebook: str | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, vqvae=vqvae)
        Autoregressive.of_pipeline(self)  # refuses a tokenizer of other tokens
        found = None if vqvae is None else fingerprint(vqvae)
        if codebook is not None and found != codebook:
            raise ValueError(
                f"vqvae has the codebook {found}, the transformer was trained on tokens of {codebook}, which mean "
                "other pictures"
            )
        self.register_to_config(codebook=found)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        *,
        guidance_scale: float = 1.0,
        guidance_end: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> PipelineOutput | tuple:
        """Generate one picture a label.

        Args:
            class_labels: numbers of the classes.
            guidance_scale, guidance_end, temperature, top_k, top_p: see
                :class:`genkit.token_sampling.TokenSampling`.
            num_images_per_label: pictures a label, next to each other.
            generator: one, or one a picture: then a picture does not depend on its neighbours.
            output_type: ``pil``, ``np`` ``(B, H, W, C)`` in [0, 1], ``pt`` ``(B, C, H, W)`` in [0, 1], or ``latent``,
                the same in [-1, 1].

        Raises:
            ValueError: a label or setting out of range, no pictures, another number of generators than of pictures.
        """
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label={num_images_per_label}: must be at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: accepted are pil, np, pt, latent")
        sampling = TokenSampling(guidance_scale, guidance_end, temperature, top_k, top_p)
        model = Autoregressive.of_pipeline(self)
        condition = model.encode(self, class_labels=class_labels).repeat(num_images_per_label)
        b, n = len(condition), model.num_tokens
        if isinstance(generator, list):
            if len(generator) != b:
                raise ValueError(f"generator has {len(generator)} entries for {b} images; give one, or one an image")
            uniform = torch.stack([torch.rand(n, generator=g, device=g.device, dtype=torch.float64) for g in generator])
        else:
            device = self.device if generator is None else generator.device
            uniform = torch.rand(b, n, generator=generator, device=device, dtype=torch.float64)
        tokens = model.sample(uniform.to(self.device), condition.to(self.device), sampling)
        images = model.pictures(tokens)
        if output_type != "latent":
            images = VaeImageProcessor(vae_scale_factor=1).postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return PipelineOutput(images, model.calls) if return_dict else (images, model.calls)
