"""SD3Transformer2DModel of Stable Diffusion 3 and 3.5."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit._diffusers import execution_device
from genkit.denoisers.base import Condition
from genkit.denoisers.network import NetworkDenoiser, texts


class SD3(NetworkDenoiser):
    """``transformer(z, prompt_embeds, pooled, timestep)``, a velocity on the linear path.

    Condition: ``prompt_embeds`` ``(B, L, D)``, ``pooled_prompt_embeds`` ``(B, P)``.
    """

    network_classes = ("SD3Transformer2DModel",)
    prediction_types = ("flow_prediction",)
    condition_names = ("prompt_embeds", "pooled_prompt_embeds")
    arguments = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}

    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        z, condition = self._inputs(z, condition)
        return self.network(
            hidden_states=z,
            timestep=timestep,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def time_modules(self) -> list[str]:
        return ["time_text_embed"]

    @torch.no_grad()
    def encode(
        self,
        pipe,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        max_sequence_length: int = 256,
        **more: Any,
    ) -> Condition:
        """Prompts as ``pipe`` encodes them; without ``negative_prompt`` the unconditional branch is the empty text.

        ``more`` goes to ``pipe.encode_prompt`` (``prompt_2``, ``prompt_3``, ``clip_skip`` ...).
        """
        prompts = texts(prompt)
        negative = None if negative_prompt is None else texts(negative_prompt, len(prompts))
        embeds, negative_embeds, pooled, negative_pooled = pipe.encode_prompt(
            prompt=prompts,
            device=execution_device(pipe),
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negative,
            max_sequence_length=max_sequence_length,
            **{"prompt_2": None, "prompt_3": None, **more},
        )
        return Condition(
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
            {"prompt_embeds": negative_embeds, "pooled_prompt_embeds": negative_pooled},
        )
