"""Between an autoencoder's latents and the standardised ones that networks see."""

from typing import Any

import torch
from torch import Tensor


def standardise(vae: Any, z: Tensor) -> Tensor:
    """``(z - shift) scale``, or ``(z - mean) scale / std`` by channel where the config has ``latents_mean``.

    Args:
        vae: an autoencoder of Diffusers.
        z: what it encoded, ``(B, C, ...)``.
    """
    scale, shift, spread = _standard(vae, z)
    return (z - shift) * scale / spread


def unstandardise(vae: Any, latents: Tensor) -> Tensor:
    """What the autoencoder decodes: the inverse of :func:`standardise`."""
    scale, shift, spread = _standard(vae, latents)
    return latents * spread / scale + shift


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Pictures, nominally in [-1, 1] and in float32 at least, with a gradient; ``latents`` itself without ``vae``."""
    if vae is None:
        return latents
    pictures = vae.decode(unstandardise(vae, latents).to(vae.dtype), return_dict=False)[0]
    return pictures.to(torch.promote_types(pictures.dtype, torch.float32))


def compression(vae: Any) -> int:
    """Pixels along a side of a picture to one along a side of its latents; 1 without ``vae``."""
    if vae is None:
        return 1
    blocks = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels") or [0]
    return getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(blocks) - 1)


def _standard(vae: Any, like: Tensor) -> tuple[float, Any, Any]:
    config = vae.config
    scale, mean, std = (config.get(k) for k in ("scaling_factor", "latents_mean", "latents_std"))
    if mean is None or std is None:
        return scale or 1.0, config.get("shift_factor") or 0.0, 1.0
    shape = (1, -1, *(1,) * (like.ndim - 2))
    mean, std = (torch.tensor(v, device=like.device, dtype=like.dtype).view(shape) for v in (mean, std))
    return scale or 1.0, mean, std
