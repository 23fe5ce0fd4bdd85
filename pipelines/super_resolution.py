"""Pictures enlarged in one call of a network that was trained to, without any text encoder."""

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from torch.nn import functional as F

from genkit.denoisers import Condition, Denoiser, from_pipeline
from genkit.denoisers.flux import Flux
from genkit.denoisers.network import adapter_of, unwrap
from genkit.latents import decoded, standardise
from genkit.networks.fixed_condition import FixedCondition
from genkit.pipelines.base import PipelineOutput
from genkit.registry import unknown

OUTPUT_TYPES = ("pil", "np", "pt")


class SuperResolutionPipeline(DiffusionPipeline):
    """Pictures ``scale`` times as high and wide: ``decode(D(encode(upsampled), time))``, ``D`` the clean-sample view.

    The enlarged picture's latents are taken for the noisy sample at ``time``; none is added::

        pipe = SuperResolutionPipeline.from_pretrained("outputs/d3sr/pipeline")
        large = pipe(small).images[0]

    Args:
        scheduler: names the path and the prediction type; nothing is scheduled.
        vae: ``None`` for a network of pixels.
        unet, transformer: the network, one of the two.
        condition: what the network is told of every picture.
        scale: of height and width.
        time: of the one evaluation, in (0, 1].

    Raises:
        ValueError: a scale or time out of range.

    Source: Li et al., "Distillation-free one-step diffusion for real-world image super-resolution", arXiv 2410.04224.
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    _exclude_from_cpu_offload = ["condition"]
    _optional_components = ["vae", "unet", "transformer"]

    def __init__(self, scheduler, condition, vae=None, unet=None, transformer=None, scale: int = 4, time: float = 0.25):
        super().__init__()
        if scale < 1 or scale != int(scale):
            raise ValueError(f"scale={scale}: accepted are whole numbers from 1 on")
        if not 0 < time <= 1:
            raise ValueError(f"time={time}: accepted are numbers in (0, 1]")
        self.register_modules(scheduler=scheduler, condition=condition, vae=vae, unet=unet, transformer=transformer)
        self.register_to_config(scale=scale, time=time)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, torch_dtype: torch.dtype | None = None, **overrides):
        """Around the network and autoencoder of another pipeline, shared; its encoders are asked once and left out.

        Raises:
            ValueError: an override that is no argument of the constructor.
        """
        accepted = set(inspect.signature(cls.__init__).parameters) - {"self"}
        for name in overrides:
            if name not in accepted:
                raise ValueError(unknown(f"{cls.__name__}.from_pipe: argument", name, accepted))
        given = {**pipeline.config, **pipeline.components, **overrides}
        if given.get("condition") is None:
            given["condition"] = unprompted(pipeline)
        new = cls(**{k: v for k, v in given.items() if k in accepted})
        return new if torch_dtype is None else new.to(dtype=torch_dtype)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in Diffusers.

        Raises:
            ValueError: the network carries a LoRA, which would be saved as part of it; see :func:`fused`.
        """
        if getattr(unwrap(self.network), "peft_config", None):
            raise ValueError(f"{type(unwrap(self.network)).__name__} carries a LoRA; save a pipeline of fused(network)")
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def network(self) -> Any:
        """The network, a module."""
        return self.unet if self.unet is not None else self.transformer

    def denoiser(self) -> Denoiser:
        """The network on the path of the scheduler."""
        return from_pipeline(self)

    @cached_property
    def image_processor(self) -> VaeImageProcessor:
        """Pictures to tensors in [-1, 1] and back, without a change of size."""
        grey = self._channels == 1
        return VaeImageProcessor(do_resize=False, do_convert_grayscale=grey, do_convert_rgb=not grey)

    @property
    def _channels(self) -> int:
        part: Any = unwrap(self.network) if self.vae is None else self.vae
        return part.config.in_channels

    @property
    def unit(self) -> int:
        """Pixels that the sides of what the network sees are multiples of."""
        network = unwrap(self.network)
        patch = 2 if adapter_of(network) is Flux else getattr(network.config, "patch_size", None) or 1
        return patch * self._factor

    @property
    def fixed_size(self) -> int | None:
        """The side in pixels of all that the network can see, where it takes no other."""
        prompted = "prompt_embeds" in getattr(self.denoiser(), "condition_names", ())
        network: Any = unwrap(self.network)
        return None if prompted else network.config.sample_size * self._factor

    @property
    def _factor(self) -> int:
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        *,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> PipelineOutput | tuple:
        """Enlarge pictures.

        Args:
            image: a PIL image, an array or a tensor in [0, 1], ``(B, C, h, w)`` or ``(C, h, w)``, or a list of these of
                one size.
            tile_size: side, in pixels of the large picture, of tiles that go through autoencoder and network one after
                the other and are blended; bounds memory. Unset, the picture goes through whole, except where the
                network has a :attr:`fixed_size`, which then is that of the tiles.
            tile_overlap: of neighbouring tiles in pixels; a quarter of ``tile_size`` by default. A tile counts for
                nothing within a quarter of it from its border.
            output_type: ``pil``, ``np`` or ``pt``.

        Raises:
            ValueError: pictures of different sizes or channels, tiles that do not fit the network, an autoencoder that
                overflows in float16.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(unknown("output_type", output_type, OUTPUT_TYPES))
        vae = self.vae
        if vae is not None and vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            raise ValueError(
                f"vae={type(vae).__name__} in float16 with force_upcast overflows: use float32 or bfloat16"
            )
        tile, overlap = self._tiles(tile_size, tile_overlap)
        low = self._pictures(image).to(self._execution_device)
        x = upsampled(low, self.config.scale)
        padded = _padded(x, self.unit, self.fixed_size or self.unit)
        denoiser = self.denoiser()

        def enlarge(piece: Tensor) -> Tensor:
            return decoded(vae, restore(denoiser, to_latents(vae, piece), self.config.time, self.condition))

        out = tiled(enlarge, padded, tile, overlap)[..., : x.shape[-2], : x.shape[-1]]
        images = self.image_processor.postprocess(out, output_type=output_type)
        self.maybe_free_model_hooks()
        return PipelineOutput(images, denoiser.calls) if return_dict else (images, denoiser.calls)

    def _pictures(self, image: Any) -> Tensor:
        one = image if isinstance(image, (list, tuple)) else [image]
        parts = [self.image_processor.preprocess(i) for i in one]
        if not parts or any(p.shape[1:] != parts[0].shape[1:] or p.shape[1] != self._channels for p in parts):
            raise ValueError(
                f"image: got shapes {[tuple(p.shape) for p in parts]}; accepted are pictures of one size with "
                f"{self._channels} channels"
            )
        return torch.cat(parts).float()

    def _tiles(self, tile: int | None, overlap: int | None) -> tuple[int | None, int]:
        fixed, unit = self.fixed_size, self.unit
        if tile is None and fixed is None:
            if overlap is not None:
                raise ValueError(f"tile_overlap={overlap} has no effect without tile_size")
            return None, 0
        tile = fixed if tile is None else tile
        assert tile is not None
        if tile < unit or tile % unit or fixed not in (None, tile):
            raise ValueError(f"tile_size={tile}: accepted is {fixed or f'a multiple of {unit}'}")
        overlap = tile // 4 // unit * unit if overlap is None else overlap
        if not 0 <= overlap < tile or overlap % unit:
            raise ValueError(f"tile_overlap={overlap}: accepted are multiples of {unit} below tile_size={tile}")
        return tile, overlap


# -- parts that training shares -------------------------------------------------------------------------------------


def upsampled(low: Tensor, scale: int) -> Tensor:
    """Pictures ``(B, C, h, w)`` in [-1, 1] to ``(B, C, scale h, scale w)`` by bicubic interpolation."""
    return F.interpolate(low, scale_factor=scale, mode="bicubic", align_corners=False).clamp(-1, 1)


def restore(denoiser: Denoiser, z: Tensor, time: float, condition: FixedCondition) -> Tensor:
    """The clean sample that the network sees in ``z`` ``(B, ...)`` taken as noisy at ``time``; float32 at least."""
    t = torch.full((len(z),), time, device=z.device)
    return denoiser(z, t, condition(len(z)).to(z.device)).sample


def to_latents(vae: Any, pictures: Tensor) -> Tensor:
    """The posterior's mean as networks see it, float32 at least; pictures themselves without a ``vae``."""
    if vae is None:
        return pictures
    mean = vae.encode(pictures.to(vae.dtype)).latent_dist.mean
    return standardise(vae, mean.to(torch.promote_types(mean.dtype, torch.float32)))


def unprompted(pipe: Any) -> FixedCondition:
    """What the network of ``pipe`` is told where there is nothing to tell: the empty prompt, no class."""
    held = pipe.components.get("condition")
    if isinstance(held, FixedCondition):
        return held
    denoiser = from_pipeline(pipe)
    config: Any = unwrap(denoiser.module).config
    if "prompt_embeds" in getattr(denoiser, "condition_names", ()):
        encoder = getattr(pipe, "classic", None) or pipe
        condition = denoiser.encode(encoder, prompt="", negative_prompt="")
    elif config.get("num_classes") or config.get("num_embeds_ada_norm"):
        condition = denoiser.encode(pipe, class_labels=[0]).null()
    else:
        condition = Condition()
    return FixedCondition.of(condition)


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, overlap: int) -> Tensor:
    """``function``, which keeps shapes, over overlapping tiles of ``x`` ``(B, C, H, W)``, blended.

    Weights rise linearly over the middle half of ``overlap`` and vanish outside of it, so that a function that sees no
    further than a quarter of ``overlap`` gives what it gives of the whole picture.

    Args:
        tile: side; ``None`` for one tile of the whole picture.
    """
    height, width = x.shape[-2:]
    if tile is None or tile >= max(height, width):
        return function(x)
    total: Any = 0
    weights: Any = 0
    for top, rows in _spans(height, tile, overlap):
        for left, columns in _spans(width, tile, overlap):
            window = (slice(top, top + len(rows)), slice(left, left + len(columns)))
            weight = (rows[:, None] * columns).to(x.device)
            piece = function(x[..., window[0], window[1]])
            if isinstance(total, int):
                total, weights = piece.new_zeros(*piece.shape[:2], height, width), piece.new_zeros(height, width)
            total[..., window[0], window[1]] += piece * weight
            weights[window] += weight
    return total / weights


def _spans(size: int, tile: int, overlap: int) -> list[tuple[int, Tensor]]:
    """First pixels of the tiles along one axis, with the weights of theirs."""
    if size <= tile:
        return [(0, torch.ones(size))]
    starts = [*range(0, size - tile, tile - overlap), size - tile]
    places = torch.arange(tile) + 0.5
    spans = []
    for start in starts:
        from_left = places if start else torch.full_like(places, torch.inf)
        from_right = tile - places if start + tile < size else torch.full_like(places, torch.inf)
        depth = torch.minimum(from_left, from_right)
        weight = ((depth - overlap / 4) / (overlap / 2)).clamp(0, 1) if overlap else torch.ones(tile)
        spans.append((start, weight))
    return spans


def _padded(x: Tensor, unit: int, least: int) -> Tensor:
    """``x`` with its last rows and columns repeated, up to multiples of ``unit`` and to ``least`` pixels."""
    sides = [max(least, -(-side // unit) * unit) for side in x.shape[-2:]]
    return F.pad(x, (0, sides[1] - x.shape[-1], 0, sides[0] - x.shape[-2]), mode="replicate")
