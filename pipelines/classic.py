"""What Diffusers' own pipeline of a network does around it: encoding of prompts, sizes, schedule, decoding."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from genkit.denoisers.network import unwrap
from genkit.latents import unstandardise


def classic_pipeline(network: nn.Module, parts: Mapping[str, Any]) -> DiffusionPipeline | None:
    """Diffusers' pipeline that turns prompts into images by ``network``; ``None`` for a network that takes no prompts.

    Args:
        network: the denoising network, under whichever wrappers.
        parts: components (``None`` where there is none) and settings by name; those that the pipeline does not take
            are left out.
    """
    inner: Any = unwrap(network)
    names = {c.__name__ for c in type(inner).__mro__}
    if "UNet2DConditionModel" in names:
        is_xl = inner.config.addition_embed_type == "text_time"
        name = "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    elif "SD3Transformer2DModel" in names:
        name = "StableDiffusion3Pipeline"
    elif "FluxTransformer2DModel" in names:
        name = "FluxPipeline"
    else:
        return None
    cls = getattr(diffusers, name)
    accepted = inspect.signature(cls.__init__).parameters
    given = {k: v for k, v in parts.items() if k in accepted}
    if "requires_safety_checker" in accepted:  # whether there is one has been decided where the parts come from
        given["requires_safety_checker"] = parts.get("safety_checker") is not None
    return cls(**given)


def latent_shape(classic: Any, height: int | None, width: int | None) -> tuple[int, int, int]:
    """``(C, H, W)`` of the latents of an image of this size in pixels; by default the one the network was trained for.

    Raises:
        ValueError: a size that is no multiple of what autoencoder and network divide it by.
    """
    config = _network(classic).config
    size = getattr(classic, "default_sample_size", None) or config.sample_size
    default = (size, size) if isinstance(size, int) else tuple(size)
    factor, step = classic.vae_scale_factor, classic.vae_scale_factor * _patch(classic)
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and (pixels < 1 or pixels % step):
            raise ValueError(f"{name}={pixels}: must be a positive multiple of {step}")
    rows = default[0] if height is None else height // factor
    columns = default[1] if width is None else width // factor
    return config.in_channels // (4 if _is_flux(classic) else 1), rows, columns


def set_schedule(
    classic: Any,
    shape: tuple[int, ...],
    num_inference_steps: int,
    device: torch.device,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
) -> None:
    """The scheduler's steps as Diffusers' pipeline chooses them, with the shift that it derives from the image's size.

    Args:
        shape: of the latents, ``(..., H, W)``.
        sigmas, timesteps: a schedule of one's own.

    Raises:
        ValueError: both, or a scheduler that does not take what is given.
    """
    config = classic.scheduler.config
    shift: dict[str, float] = {}
    dynamic = isinstance(classic, StableDiffusion3Pipeline) and config.get("use_dynamic_shifting")
    takes_shift = "mu" in inspect.signature(classic.scheduler.set_timesteps).parameters
    if takes_shift and (dynamic or _is_flux(classic)):  # Flux names it always; schedulers may not heed it
        tokens = shape[-2] * shape[-1] // _patch(classic) ** 2
        shift["mu"] = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15 if _is_flux(classic) else 1.16),
        )
    if _is_flux(classic) and sigmas is None and timesteps is None and not config.get("use_flow_sigmas"):
        sigmas = numpy.linspace(1.0, 1 / num_inference_steps, num_inference_steps)  # type: ignore[assignment]
    retrieve_timesteps(classic.scheduler, num_inference_steps, device, timesteps, sigmas, **shift)


def decode(vae: Any, latents: Tensor, *, upcast: bool = False) -> Tensor:
    """Images ``(B, C, H, W)`` in about [-1, 1] from latents as the network sees them.

    ``upcast`` runs a float16 autoencoder that asks for it in float32, as Diffusers does for SDXL.
    """
    half = upcast and vae.dtype == torch.float16 and vae.config.force_upcast
    if half:
        vae.to(dtype=torch.float32)
    latents = unstandardise(vae, latents).to(get_module_execution_device(vae), vae.dtype)
    image = vae.decode(latents, return_dict=False)[0]
    if half:
        vae.to(dtype=torch.float16)
    return image.float()


def is_xl(classic: Any) -> bool:
    """Whether it is SDXL's, whose autoencoder overflows in float16."""
    return isinstance(classic, StableDiffusionXLPipeline)


def _is_flux(classic: Any) -> bool:
    return isinstance(classic, FluxPipeline)


def _network(classic: Any) -> Any:
    return unwrap(classic.unet if getattr(classic, "unet", None) is not None else classic.transformer)


def _patch(classic: Any) -> int:
    return 2 if _is_flux(classic) else getattr(classic, "patch_size", 1)
