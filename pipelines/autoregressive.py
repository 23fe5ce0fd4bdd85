"""Class-conditional pictures from an autoregressive network, a token after the other."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from genkit.autoregressive import Autoregressive
from genkit.networks.gpt import GPT
from genkit.pipelines.base import PipelineOutput


class AutoregressivePipeline(DiffusionPipeline):
    """Pictures of given classes from :class:`genkit.networks.gpt.GPT`, whose tokens are grey levels.

    Args:
        transformer: the network.
    """

    network_class = GPT
    student_class = Autoregressive

    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        *,
        guidance_scale: float = 1.0,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> PipelineOutput | tuple:
        """Generate one picture a label.

        Args:
            class_labels: numbers of the classes.
            guidance_scale: of classifier-free guidance on the logits; 1 is none.
            num_images_per_label: pictures a label, next to each other.
            generator: one, or one a picture: then a picture does not depend on its neighbours.
            output_type: ``pil``, ``np`` ``(B, H, W, C)`` in [0, 1], ``pt`` ``(B, C, H, W)`` in [0, 1], or ``latent``,
                the same in [-1, 1].

        Raises:
            ValueError: a label out of range, no pictures, another number of generators than of pictures.
        """
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label={num_images_per_label}: must be at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: accepted are pil, np, pt, latent")
        model = Autoregressive(self.transformer)
        condition = model.encode(self, class_labels=class_labels).repeat(num_images_per_label)
        b, n = len(condition), self.transformer.config.sample_size**2
        if isinstance(generator, list):
            if len(generator) != b:
                raise ValueError(f"generator has {len(generator)} entries for {b} images; give one, or one an image")
            uniform = torch.stack([torch.rand(n, generator=g, device=g.device, dtype=torch.float64) for g in generator])
        else:
            device = self.device if generator is None else generator.device
            uniform = torch.rand(b, n, generator=generator, device=device, dtype=torch.float64)
        tokens = model.sample(uniform.to(self.device), condition.to(self.device), guidance_scale)
        images = model.pictures(tokens)
        if output_type != "latent":
            images = VaeImageProcessor(vae_scale_factor=1).postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return PipelineOutput(images, model.calls) if return_dict else (images, model.calls)
