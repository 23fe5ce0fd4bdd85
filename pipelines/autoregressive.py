"""Class-conditional pictures from an autoregressive network, a token after the other."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from genkit.autoregressive import Autoregressive
from genkit.denoisers.network import unwrap
from genkit.networks.gpt import GPT
from genkit.networks.tokenizer import ImageTokenizer
from genkit.pipelines.base import PipelineOutput
from genkit.token_sampling import TokenSampling

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fingerprints(tokenizer: ImageTokenizer) -> dict[str, str]:
    """The first 12 hexadecimal digits of the SHA-256 of a tokenizer's codes and weights, by the type of the weights.

    Of each type that it may be loaded in, since rounding makes other weights of them. Codes are float32 always, and
    those of a baked tokenizer are the same.
    """
    tokenizer = unwrap(tokenizer)  # type: ignore[assignment]
    state = {name: value for name, value in tokenizer.state_dict().items() if not name.startswith("quantizer.")}
    start = hashlib.sha256()
    _add(start, "codes", tokenizer.quantizer.codebook().float())
    found = {}
    for name, dtype in _DTYPES.items():
        digest = start.copy()
        for key, value in sorted(state.items()):
            _add(digest, key, value.to(dtype))
        found[name] = digest.hexdigest()[:12]
    return found


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


class AutoregressivePipeline(DiffusionPipeline):
    """Pictures of given classes from :class:`genkit.networks.gpt.GPT`, token after token.

    Args:
        transformer: the network.
        vqvae: the tokenizer whose tokens they are; without one they are grey levels.
        tokenizer_fingerprints: of the tokenizer on whose tokens the network was trained, filled in by itself.

    Raises:
        ValueError: a tokenizer with another number of codes than the network has tokens; other codes or weights than
            those of the one that the network was trained with.
    """

    network_class = GPT
    student_class = Autoregressive
    sampling_class = TokenSampling
    model_cpu_offload_seq = "transformer->vqvae"

    _optional_components = ["vqvae"]

    def __init__(self, transformer, vqvae=None, tokenizer_fingerprints: dict[str, str] | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, vqvae=vqvae)
        self.register_to_config(tokenizer_fingerprints=tokenizer_fingerprints)
        self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer of other tokens; what it is, is noted for those who load this pipeline."""
        Autoregressive.of_pipeline(self)
        found = None if self.vqvae is None else fingerprints(self.vqvae)
        known = self.config.tokenizer_fingerprints
        if known is not None:
            dtype = str(getattr(self.vqvae, "dtype", torch.float32)).removeprefix("torch.")
            dtype = dtype if dtype in _DTYPES else "float32"
            if found is None or found[dtype] != known[dtype]:
                raise ValueError(
                    f"vqvae has the fingerprint {found and found[dtype]}, the transformer was trained on tokens of "
                    f"{known[dtype]}, which mean other pictures; accepted is the tokenizer with those codes and weights"
                )
        self.register_to_config(tokenizer_fingerprints=found)
        self._checked = self.vqvae

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
            ValueError: a label or setting out of range, no pictures, another number of generators than of pictures, a
                ``vqvae`` in place of the one that was there with other codes or weights.
        """
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label={num_images_per_label}: must be at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: accepted are pil, np, pt, latent")
        if self.vqvae is not self._checked:
            self._check_tokenizer()
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
