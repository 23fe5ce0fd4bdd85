"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x and SDXL."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit._diffusers import execution_device
from genkit.denoisers.base import Condition
from genkit.denoisers.network import NetworkDenoiser, texts


class UNet2D(NetworkDenoiser):
    """``unet(z, timestep, prompt_embeds, added_cond_kwargs)``; ``z`` is what ``scale_model_input`` gives.

    Condition: ``prompt_embeds`` ``(B, L, D)``; for SDXL also ``text_embeds`` ``(B, P)`` and ``time_ids`` ``(B, 6)``;
    for networks with an embedded guidance scale ``timestep_cond`` ``(B, time_cond_proj_dim)``.
    """

    network_classes = ("UNet2DConditionModel",)

    arguments = {"prompt_embeds": "encoder_hidden_states"}

    @property
    def condition_names(self):  # type: ignore[override]
        config = self.inner.config
        names: tuple[str, ...] = ("prompt_embeds",)
        if config.addition_embed_type == "text_time":
            names += ("text_embeds", "time_ids")
        return names + (("timestep_cond",) if config.time_cond_proj_dim else ())

    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        z, condition = self._inputs(z, condition)
        added = {k: condition[k] for k in ("text_embeds", "time_ids") if k in condition.values}
        return self.network(
            z,
            timestep,
            encoder_hidden_states=condition["prompt_embeds"],
            timestep_cond=condition.values.get("timestep_cond"),
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]

    def time_modules(self) -> list[str]:
        return ["time_embedding"]

    @torch.no_grad()
    def encode(
        self,
        pipe,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        guidance_scale: float = 7.5,
        **more: Any,
    ) -> Condition:
        """Prompts as ``pipe`` encodes them; the sizes, in pixels, are SDXL's micro-conditioning.

        ``guidance_scale`` is read only by networks that embed it (latent consistency models); ``more`` goes to
        ``pipe.encode_prompt`` (``prompt_2``, ``clip_skip`` ...).
        """
        config = self.inner.config
        prompts = texts(prompt)
        negative = None if negative_prompt is None else texts(negative_prompt, len(prompts))
        encoded = pipe.encode_prompt(
            prompt=prompts,
            device=execution_device(pipe),
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negative,
            **more,
        )
        values, null = {"prompt_embeds": encoded[0]}, {"prompt_embeds": encoded[1]}
        if config.addition_embed_type == "text_time":
            pixels = config.sample_size * pipe.vae_scale_factor
            size = (height or pixels, width or pixels)
            ids = [*(original_size or size), *crops_coords_top_left, *(target_size or size)]
            time_ids = torch.tensor([ids] * len(prompts), dtype=encoded[0].dtype, device=encoded[0].device)
            values |= {"text_embeds": encoded[2], "time_ids": time_ids}
            null |= {"text_embeds": encoded[3], "time_ids": time_ids}
        if config.time_cond_proj_dim:
            scale = torch.full((len(prompts),), guidance_scale - 1, device=encoded[0].device)
            embedded = pipe.get_guidance_scale_embedding(scale, embedding_dim=config.time_cond_proj_dim)
            values["timestep_cond"] = null["timestep_cond"] = embedded.to(encoded[0].dtype)
        return Condition(values, null)
