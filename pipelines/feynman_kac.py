"""Weighted particles: images that follow the density which guidance only aims at, with weights and log Z."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from genkit.feynman_kac.base import FeynmanKac
from genkit.feynman_kac.fkc import FKC
from genkit.guidance.base import Guider
from genkit.pipelines.base import DenoiserPipeline, with_parts
from genkit.rng import ItemRNG
from genkit.schedulers.exact_denoiser import ExactDenoiserScheduler


@dataclass
class FeynmanKacOutput(BaseOutput):
    """``N`` groups of ``K`` particles: ``images``, of group ``n`` the entries ``n K`` to ``n K + K - 1``; their
    normalised ``weights`` ``(N, K)``; ``log_z`` ``(N,)``; ``chosen`` ``(N,)``, the number of one image a group, drawn
    by weight; ``network_calls`` that each particle took."""

    images: Any
    weights: Tensor
    log_z: Tensor
    chosen: Tensor
    network_calls: int
    nsfw_content_detected: list[bool] | None = None


class FeynmanKacPipeline(DenoiserPipeline):
    """Groups of weighted, resampled particles for every prompt or label; see :mod:`genkit.feynman_kac`.

    By default Feynman-Kac correctors of the guider: with ``guidance_scale=w`` the weighted particles follow
    ``q(x)^{1-w} q(x|c)^w``, which classifier-free guidance by itself does not::

        pipe = FeynmanKacPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        out = pipe("a lighthouse", num_particles=8, guidance_scale=1.4)
        best = out.images[out.chosen[0]]

    Args:
        scheduler: an :class:`genkit.schedulers.exact_denoiser.ExactDenoiserScheduler`; the model's own is turned into
            one with ``noise_scale=1``, since copies of a particle separate only where noise is injected. Its
            ``exponent_sum`` anneals the density. Another one can be assigned to ``pipe.scheduler``.
        parts: see :class:`genkit.pipelines.base.DenoiserPipeline`.
    """

    @with_parts
    def __init__(self, **parts):
        parts["scheduler"] = noisy(parts["scheduler"], 1.0)
        super().__init__(**parts)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 50,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_particles: int | None = None,
        particles: FeynmanKac | None = None,
        guider: Guider | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **arguments: Any,
    ) -> FeynmanKacOutput | tuple:
        """Generate particles.

        Args:
            prompt, class_labels: what the network is told, by which of the two it takes; neither for an unconditional
                network, which is given ``batch_size``.
            num_particles: ``K``, particles a group, 8 by default.
            particles: the particle method with its settings; ``FKC(num_particles)`` by default.
            guider, guidance_scale: as in :class:`genkit.pipelines.text_to_image.TextToImagePipeline`; FKC takes CFG
                and :class:`genkit.guidance.experts.Experts`.
            num_images_per_prompt: groups a prompt, independent of each other.
            generator: one, one a particle, or one a group: then a group does not depend on its neighbours.
            arguments: the others of ``TextToImagePipeline``.

        Returns:
            :class:`FeynmanKacOutput`, or with ``return_dict=False`` the tuple ``(images, weights, log_z, chosen)``.

        Raises:
            ValueError: fewer than one particle, a guider or a scheduler that the particle method refuses, arguments
                that do not fit; before the network is first called.
        """
        particles = method(particles, num_particles)
        count = particles.num_particles
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: must be at least 1")
        groups = num_images_per_prompt * asked(prompt, class_labels, arguments)
        if isinstance(generator, list) and len(generator) == groups and count > 1:
            generator = [child for g in generator for child in _children(g, count)]
        run = self._generate(
            num_inference_steps,
            prompt=prompt,
            class_labels=class_labels,
            guider=guider,
            guidance_scale=guidance_scale,
            particles=particles,
            num_images_per_prompt=num_images_per_prompt * count,
            generator=generator,
            output_type=output_type,
            **arguments,
        )
        log_weights = run.state.log_weights
        assert log_weights is not None
        chosen = log_weights.choose(ItemRNG(0, _seeds(generator, len(log_weights.values), count)))
        made = self._finish(run, output_type)
        output = FeynmanKacOutput(
            images=made.images,
            weights=log_weights.normalised,
            log_z=log_weights.log_z,
            chosen=chosen,
            network_calls=made.network_calls,
            nsfw_content_detected=made.nsfw_content_detected,
        )
        return output if return_dict else (output.images, output.weights, output.log_z, output.chosen)


def noisy(scheduler: Any, exponent_sum: float) -> Any:
    """The scheduler, if it says how much noise it injects, or one that does."""
    if scheduler is None or isinstance(scheduler, ExactDenoiserScheduler):
        return scheduler
    return ExactDenoiserScheduler.from_scheduler(scheduler, noise_scale=1.0, exponent_sum=exponent_sum)


def method(particles: FeynmanKac | None, num_particles: int | None) -> FeynmanKac:
    """The particle method of a call."""
    if particles is None:
        return FKC(8 if num_particles is None else num_particles)
    if num_particles not in (None, particles.num_particles):
        raise ValueError(
            f"num_particles={num_particles}, but particles={type(particles).__name__} was made for "
            f"{particles.num_particles}; give one"
        )
    return particles


def asked(prompt: Any, class_labels: Any, arguments: dict[str, Any]) -> int:
    """How many prompts, labels or unconditional images were asked for."""
    for given in (prompt, class_labels, arguments.get("condition")):
        if given is not None:
            return 1 if isinstance(given, (str, int)) else len(given)
    return arguments.get("batch_size") or 1


def _children(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Generators of the particles of a group, a function of the group's."""
    return [torch.Generator(generator.device).manual_seed(_seed(generator)) for _ in range(count)]


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(1 << 62, (), generator=generator, device=device))


def _seeds(generator: torch.Generator | list[torch.Generator] | None, groups: int, count: int) -> list[int]:
    """A seed a group, drawn from where its particles draw."""
    return [_seed(generator[n * count] if isinstance(generator, list) else generator) for n in range(groups)]
