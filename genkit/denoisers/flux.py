"""FluxTransformer2DModel of FLUX.1."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit._diffusers import execution_device
from genkit.denoisers.base import Condition
from genkit.denoisers.network import NetworkDenoiser, texts


def pack(z: Tensor) -> Tensor:
    """Latents ``(B, C, H, W)`` -> tokens ``(B, H/2 * W/2, 4 C)``: every 2 x 2 patch is a token.

    Raises:
        ValueError: an odd height or width.
    """
    b, c, h, w = z.shape
    if h % 2 or w % 2:
        raise ValueError(f"latents of Flux need an even height and width, got shape {tuple(z.shape)}")
    return z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`; ``height`` and ``width`` are those of the latents."""
    b, _, c = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Positions ``(0, row, column)`` of the tokens of latents of this size, shape ``(H/2 * W/2, 3)``."""
    sides = (torch.arange(side // 2, device=like.device) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).to(like.dtype)


class Flux(NetworkDenoiser):
    """``transformer(tokens, timestep / 1000, guidance, prompt_embeds, pooled, ids)``, a velocity on the linear path.

    Condition: ``prompt_embeds`` ``(B, L, D)``, ``pooled_prompt_embeds`` ``(B, P)`` and, for networks with a distilled
    guidance (FLUX.1-dev), ``guidance`` ``(B,)``.
    """

    network_classes = ("FluxTransformer2DModel",)
    prediction_types = ("flow_prediction",)

    arguments = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}

    @property
    def condition_names(self):  # type: ignore[override]
        names = ("prompt_embeds", "pooled_prompt_embeds")
        return names + (("guidance",) if self.inner.config.guidance_embeds else ())

    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        z, condition = self._inputs(z, condition)
        height, width = z.shape[-2:]
        embeds = condition["prompt_embeds"]
        tokens = self.network(
            hidden_states=pack(z),
            timestep=timestep.to(z.dtype) / 1000,
            guidance=condition.values.get("guidance"),
            pooled_projections=condition["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=image_ids(height, width, z),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def time_modules(self) -> list[str]:
        return ["time_text_embed"]

    @torch.no_grad()
    def encode(
        self,
        pipe,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        guidance_scale: float = 3.5,
        max_sequence_length: int = 512,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        **more: Any,
    ) -> Condition:
        """Prompts as ``pipe`` encodes them, under the distilled ``guidance_scale``.

        There is an unconditional branch only with a ``negative_prompt`` (``""`` will do): the guidance of these
        networks is distilled, so guiding them again is something to ask for. ``prompt_2`` is what T5 reads, if
        something else; ``more`` goes to ``pipe.encode_prompt``.
        """
        prompts = texts(prompt)

        def values(batch: list[str], batch_2) -> dict[str, Tensor]:
            embeds, pooled, _ = pipe.encode_prompt(
                prompt=batch,
                prompt_2=None if batch_2 is None else texts(batch_2, len(batch)),
                device=execution_device(pipe),
                max_sequence_length=max_sequence_length,
                **more,
            )
            made = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            if self.inner.config.guidance_embeds:
                made["guidance"] = torch.full((len(batch),), guidance_scale, device=embeds.device)
            return made

        if negative_prompt is None:
            return Condition(values(prompts, prompt_2))
        negative = values(texts(negative_prompt, len(prompts)), negative_prompt_2)
        return Condition(values(prompts, prompt_2), negative)
