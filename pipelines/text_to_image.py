"""Images of prompts, by the components of a Stable Diffusion 1, 2, XL, 3 or Flux pipeline in genkit's own loop."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.denoisers import Condition
from genkit.guidance.base import Guider
from genkit.pipelines.base import DenoiserPipeline, PipelineOutput


class TextToImagePipeline(DenoiserPipeline):
    """Images of prompts under any guider and any scheduler that genkit has an interpolant for.

    ``TextToImagePipeline.from_pretrained`` takes the folders and repositories of Diffusers' own pipelines, and
    ``TextToImagePipeline.from_pipe`` a pipeline that is loaded. Without a guider it makes the pictures that these make
    without guidance; with :class:`genkit.guidance.cfg.CFG` those that they make at the same scale.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 50,
        *,
        height: int | None = None,
        width: int | None = None,
        guider: Guider | None = None,
        guidance_scale: float | None = None,
        condition: Condition | None = None,
        num_images_per_prompt: int = 1,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **arguments: Any,
    ) -> PipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: one or several.
            num_inference_steps: steps as the scheduler places them in the classic pipeline.
            height, width: in pixels; by default those that the network was trained for.
            guider: a genkit guider for this call. Flux needs a ``negative_prompt`` with it (``""`` will do).
            guidance_scale: short for ``guider=CFG(guidance_scale=...)``; for networks that embed the scale (FLUX.1-dev,
                latent consistency models) that scale.
            condition: what :meth:`encode` gave, in place of prompts.
            num_images_per_prompt: images a prompt, next to each other.
            sigmas, timesteps: a schedule of your own in place of ``num_inference_steps``.
            eta: of schedulers whose ``step`` takes it (DDIM).
            generator: one, or one an image: then an image does not depend on its neighbours.
            latents: noise to start from, ``(B, C, H, W)`` (unpacked for Flux), standard normal.
            output_type: ``pil``, ``np`` ``(B, H, W, C)`` in [0, 1], ``pt`` ``(B, C, H, W)`` in [0, 1], or ``latent``.
            callback_on_step_end: called as ``fn(pipe, i, timestep, {"latents": x})``; may return new latents, and may
                set ``pipe._interrupt = True`` to stop.
            arguments: passed to :meth:`encode`: ``negative_prompt``, ``prompt_2``, ``max_sequence_length``,
                ``original_size`` ...

        Raises:
            ValueError: arguments that the network does not take or that do not fit each other, a guider without an
                unconditional branch; before the network is first called.
        """
        run = self._generate(
            num_inference_steps,
            prompt=prompt,
            condition=condition,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            guider=guider,
            guidance_scale=guidance_scale,
            sigmas=sigmas,
            timesteps=timesteps,
            eta=eta,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            **arguments,
        )
        output = self._finish(run, output_type)
        return output if return_dict else (output.images, output.network_calls)
