"""Class-conditional and unconditional images, in pixels or latents, from many steps or from a flow map's few."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from genkit.guidance.base import Guider
from genkit.pipelines.base import DenoiserPipeline, PipelineOutput


class ClassConditionalPipeline(DenoiserPipeline):
    """Images of given classes from a transformer on any scheduler that genkit has an interpolant for.

    Args:
        transformer: :class:`genkit.networks.dit.DiT` or any network with an adapter that takes class labels.
        scheduler: a Diffusers scheduler, or :class:`genkit.schedulers.flow_map.FlowMapScheduler` for a flow map.
        vae: decodes latents; ``None`` for pixels.
        guider: used unless a call brings its own; ``None`` follows the conditional prediction.
        id2label: names of the classes by number, as strings (JSON keys), for :meth:`get_label_ids`.
    """

    _optional_components = ["vae", "guider"]

    def __init__(self, transformer, scheduler, vae=None, guider=None, id2label: dict[str, str] | None = None):
        DiffusionPipeline.__init__(self)  # not the base's: these are all the components that a saved folder lists
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, guider=guider)
        self.register_to_config(id2label=id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_inference_steps: int = 32,
        *,
        guider: Guider | None = None,
        guidance_scale: float | None = None,
        num_images_per_label: int = 1,
        batch_size: int | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PipelineOutput | tuple:
        """Generate one image a label.

        Args:
            class_labels: numbers of the classes; leave out for an unconditional network and give ``batch_size``.
            num_inference_steps: network evaluations without guidance; on the linear path at times ``1 - k/N``, which
                the scheduler then shifts.
            guider: a genkit guider for this call.
            guidance_scale: short for ``guider=CFG(guidance_scale=...)``.
            num_images_per_label: images a label, next to each other.
            sigmas, timesteps: a schedule of your own in place of ``num_inference_steps``.
            eta: of schedulers whose ``step`` takes it (DDIM).
            generator: one, or one an image: then an image does not depend on its neighbours.
            latents: noise to start from, ``(B, C, H, W)``.
            output_type: ``pil``, ``np`` ``(B, H, W, C)`` in [0, 1], ``pt`` ``(B, C, H, W)`` in [0, 1], or ``latent``.
            callback_on_step_end: called as ``fn(pipe, i, timestep, {"latents": x})``; may return new latents, and may
                set ``pipe._interrupt = True`` to stop.

        Raises:
            ValueError: a label out of range, a batch of 0, a guider without an unconditional branch, parts that do
                not fit.
        """
        run = self._generate(
            num_inference_steps,
            class_labels=class_labels,
            batch_size=batch_size,
            num_images_per_prompt=num_images_per_label,
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
        )
        output = self._finish(run, output_type)
        return output if return_dict else (output.images, output.network_calls)
