"""What :class:`genkit.guidance.h_transform.HTransform` is given, made of images and of masks of their pixels."""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from torch.nn import functional as F

from genkit.latents import standardise
from genkit.registry import unknown

POLICIES = ("any", "all")


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """``(B, C, H, W)`` or ``(B, C, T, H, W)`` to ``size`` ``(height, width)``: bicubic, without aliases when shrunk."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    flat = images.transpose(1, 2).flatten(0, 1) if images.ndim == 5 else images
    flat = F.interpolate(flat, size=tuple(size), mode="bicubic", antialias=True)
    return flat.unflatten(0, (len(images), -1)).transpose(1, 2) if images.ndim == 5 else flat


@torch.no_grad()
def encode_reference(vae, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """The latents of coarse images, as networks see them: the posterior's mode, shifted and scaled, in float32.

    Args:
        vae: of Diffusers, whose latents are standardised by ``shift_factor`` and ``scaling_factor``, or by
            ``latents_mean`` and ``latents_std``.
        images: ``(B, C, H, W)``, or video ``(B, C, T, H, W)``, in [-1, 1].
        size: ``(height, width)`` in pixels that they are resized to, if another.

    Raises:
        ValueError: another number of channels than the VAE takes.
    """
    channels = vae.config.get("in_channels", 3)
    if images.ndim not in (4, 5) or images.shape[1] != channels:
        raise ValueError(f"images have shape {tuple(images.shape)}: accepted is (B, {channels}, [T,] H, W)")
    if size is not None:
        images = resize(images, size)
    device = get_module_execution_device(vae)  # not where offloading keeps the weights
    latents = vae.encode(images.to(device=device, dtype=vae.dtype)).latent_dist.mode().float()
    return standardise(vae, latents)


def latent_masks(
    masks: Sequence[Tensor], size: Sequence[int], *, policy: str = "any", causal: bool = True
) -> list[Tensor]:
    """Masks of pixels as masks of latents that partition them: one for each, and last one for the rest.

    A latent belongs to the first mask that covers any (or all) of its pixels and frames.

    Args:
        masks: ``(1 or B, 1, H, W)`` or, for video, ``(1 or B, 1, T, H, W)``, of 0 and 1 or bool.
        size: of the latents, ``(h, w)`` or ``(frames, h, w)``. A mask of one frame holds for all.
        policy: ``any`` or ``all``.
        causal: the first latent frame is the first frame alone, as video VAEs have it; otherwise frames are shared out
            evenly.

    Raises:
        ValueError: an unknown policy, values other than 0 and 1, shapes that do not fit ``size``.
    """
    if policy not in POLICIES:
        raise ValueError(unknown("policy", policy, POLICIES))
    found: list[Tensor] = []
    free = torch.ones(())
    for mask in masks:
        if mask.ndim != len(size) + 2 or mask.shape[1] != 1:
            frames = "T, " if len(size) == 3 else ""
            raise ValueError(f"a mask has shape {tuple(mask.shape)}: accepted is (1 or B, 1, {frames}H, W)")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("a mask has values other than 0 and 1")
        covered = _pooled(mask.float(), tuple(size), causal)
        if policy == "all":
            covered = 1 - _pooled(1 - mask.float(), tuple(size), causal)
        found.append(covered * free)
        free = free * (1 - covered)
    return [*found, free]


def _pooled(mask: Tensor, size: tuple[int, ...], causal: bool) -> Tensor:
    """1 where any pixel of a latent is 1."""
    if len(size) == 2:
        return F.adaptive_max_pool2d(mask, size)
    (frames, height, width), given = size, mask.shape[2]
    if given in (1, frames):
        return F.adaptive_max_pool3d(mask, (given, height, width))
    rest, wanted = (given - 1, frames - 1) if causal else (given, frames)
    if not wanted or rest % wanted:
        raise ValueError(
            f"a mask has {given} frames, and latents {frames} (causal={causal}): accepted are 1, {frames} and "
            + (f"1 + k * {wanted}" if causal else f"k * {frames}")
        )
    if not causal:
        return F.adaptive_max_pool3d(mask, size)
    first = F.adaptive_max_pool3d(mask[:, :, :1], (1, height, width))
    return torch.cat((first, F.adaptive_max_pool3d(mask[:, :, 1:], (wanted, height, width))), dim=2)
