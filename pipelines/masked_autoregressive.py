"""Class-conditional pictures from a masked autoregressive network, a set of tokens after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from genkit.latents import decoded
from genkit.masked_autoregressive import MARSampling, MaskedAutoregressive
from genkit.networks.mar import MAR
from genkit.pipelines.base import OUTPUT_TYPES, PipelineOutput
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer


@dataclass
class MaskedAutoregressiveOutput(PipelineOutput):
    """Beside the images and ``network_calls`` of the transformer: ``head_calls``, one after the other, and
    ``head_evaluations``, the tokens of an image that went through the head, both branches of guidance counted."""

    head_calls: int = 0
    head_evaluations: int = 0


class MaskedAutoregressivePipeline(DiffusionPipeline):
    """Pictures of given classes from :class:`genkit.networks.mar.MAR`.

    Args:
        transformer: the network.
        vae: decodes what it makes, where that is latents.
    """

    network_class = MAR
    student_class = MaskedAutoregressive
    sampling_class = MARSampling
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(self, transformer, vae=None):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        num_inference_steps: int | StepAnnealer = 100,
        *,
        num_ar_steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: Literal["linear", "constant"] = "linear",
        temperature: float = 1.0,
        max_timestep: int = 950,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> MaskedAutoregressiveOutput | tuple:
        """Generate one picture a label.

        Args:
            class_labels: numbers of the classes.
            num_inference_steps: of the diffusion head for each token: a number, or a
                :class:`~genkit.step_annealing.StepAnnealer`, of a budget for all tokens together if so told.
            num_ar_steps, guidance_scale, guidance_schedule, temperature, max_timestep: see
                :class:`genkit.masked_autoregressive.MARSampling`.
            num_images_per_label: pictures a label, next to each other.
            generator: one, or one a picture: then a picture does not depend on its neighbours.
            output_type: ``pil``, ``np`` ``(B, H, W, C)`` in [0, 1], ``pt`` ``(B, C, H, W)`` in [0, 1], or ``latent``,
                what the network makes.

        Raises:
            ValueError: a label or a setting out of range, no pictures, more steps than tokens, another number of
                generators than of pictures.
        """
        settings = MARSampling(
            num_inference_steps, num_ar_steps, guidance_scale, guidance_schedule, temperature, max_timestep
        )
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label={num_images_per_label}: must be at least 1")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: accepted are {', '.join(OUTPUT_TYPES)}")
        device = self._execution_device
        model = MaskedAutoregressive(self.transformer)
        condition = model.encode(self, class_labels=class_labels).repeat(num_images_per_label).to(device)
        rng = ItemRNG(0, _seeds(generator, len(condition)).to(device))
        images = model.sample(rng, condition, settings)
        if output_type != "latent":
            images = decoded(self.vae, images).float()
            images = VaeImageProcessor(vae_scale_factor=1).postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        counts = (model.calls, model.head_calls, model.head_evaluations)
        if not return_dict:
            return (images, *counts)
        calls, head_calls, head_evaluations = counts
        return MaskedAutoregressiveOutput(images, calls, head_calls=head_calls, head_evaluations=head_evaluations)


def _seeds(generator: torch.Generator | list[torch.Generator] | None, n: int) -> Tensor:
    """What all randomness of each picture follows from, ``(n,)``."""
    if not isinstance(generator, list):
        device = "cpu" if generator is None else generator.device
        return torch.randint(2**62, (n,), generator=generator, device=device)
    if len(generator) != n:
        raise ValueError(f"generator has {len(generator)} entries for {n} images; give one, or one an image")
    return torch.cat([torch.randint(2**62, (1,), generator=g, device=g.device).cpu() for g in generator])
