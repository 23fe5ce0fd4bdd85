"""An image tokenizer: encoder, quantizer, decoder."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from genkit import quantizers
from genkit.checks import check_counts
from genkit.quantizers.base import Quantized, Quantizer
from genkit.registry import lookup, unknown

PadMode = Literal["replicate", "reflect"]
_PAD_MODES = ("replicate", "reflect", None)
# Settings that mean the same to Diffusers' autoencoders.
_SHARED = (
    "in_channels out_channels sample_size block_out_channels down_block_types up_block_types layers_per_block "
    "latent_channels norm_num_groups act_fn mid_block_add_attention"
).split()


@dataclass(frozen=True)
class Reconstruction:
    """Pictures ``sample`` ``(B, C, H, W)``, nominally in [-1, 1], and the ``quantized`` latents they are made of."""

    sample: Tensor
    quantized: Quantized


class ImageTokenizer(ModelMixin, ConfigMixin):
    """``x^ = decode(quantize(encode(x)))``: pictures in [-1, 1] to a grid of tokens, read row by row, and back.

    Encoder and decoder are those of Diffusers, joined to the quantizer by 1 x 1 convolutions. A token stands for
    ``stride`` x ``stride`` pixels; pictures that are not a multiple of that are padded at the right and below, and
    what is decoded is cut back. The defaults are LlamaGen's for ``stride`` 16, of 71.88 M weights with 16,384 codes of
    8 channels; channels ``(128, 256, 256, 512)`` make 8 of it.

    Args:
        quantizer: ``{"kind": ..., "dim": ..., ...}``, settings of :func:`genkit.quantizers.make`. A ``seed`` that it
            takes and is not given is drawn from torch's random state, as all initial weights are.
        in_channels, out_channels: of pictures.
        sample_size: the side of pictures that it is trained on; others are accepted.
        block_out_channels: of the levels; each but the first halves the sides.
        down_block_types, up_block_types: of Diffusers; by default with attention at the lowest level alone.
        layers_per_block: residual blocks a level, one more in the decoder.
        latent_channels: between encoder and decoder and their 1 x 1 convolutions.
        double_z: the encoder has twice ``latent_channels``, as that of an autoencoder with a variance.
        pad_mode: ``replicate``, ``reflect``, or ``None``: pictures that are no multiple of ``stride`` are an error.

    Raises:
        ValueError: a number below 1; settings that the quantizer refuses; channels that ``norm_num_groups`` does not
            divide; block types that are not one a level; another pad mode.

    Source: Sun et al., "Autoregressive model beats diffusion: Llama for scalable image generation", arXiv 2406.06525.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer"]

    @register_to_config
    def __init__(
        self,
        quantizer: dict[str, Any],
        in_channels: int = 3,
        out_channels: int = 3,
        sample_size: int = 256,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        down_block_types: tuple[str, ...] | None = None,
        up_block_types: tuple[str, ...] | None = None,
        layers_per_block: int = 2,
        latent_channels: int = 256,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        mid_block_add_attention: bool = True,
        double_z: bool = False,
        pad_mode: PadMode | None = "replicate",
    ):
        super().__init__()
        if not isinstance(block_out_channels, Sequence) or not block_out_channels:
            raise ValueError(f"block_out_channels={block_out_channels!r}: expected a list, of each level's channels")
        check_counts(in_channels=in_channels, out_channels=out_channels, sample_size=sample_size)
        check_counts(
            layers_per_block=layers_per_block, latent_channels=latent_channels, norm_num_groups=norm_num_groups
        )
        for channels in block_out_channels:
            if channels < 1 or channels % norm_num_groups:
                raise ValueError(
                    f"norm_num_groups={norm_num_groups} does not divide {channels} of block_out_channels="
                    f"{list(block_out_channels)}"
                )
        levels = len(block_out_channels)
        down = down_block_types or ("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",)
        up = up_block_types or ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1)
        if not len(down) == len(up) == levels:
            raise ValueError(f"{len(down)} down_block_types, {len(up)} up_block_types: one for each of {levels} levels")
        if pad_mode not in _PAD_MODES:
            raise ValueError(unknown("pad_mode", pad_mode, _PAD_MODES))
        if not isinstance(quantizer, dict):
            raise ValueError(f"quantizer={quantizer!r}: expected its settings, such as {{'kind': 'fsq', ...}}")
        if "kind" not in quantizer:
            raise ValueError(f"quantizer={quantizer}: kind is missing; accepted are {', '.join(quantizers.names())}")
        settings = _seeded(quantizer)
        self.register_to_config(quantizer=settings)
        shared = dict(
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.encoder = Encoder(in_channels, latent_channels, tuple(down), double_z=double_z, **shared)
        self.quantizer = _make(settings)  # type: ignore[misc]
        dim = self.quantizer.dim
        self.quant_conv = nn.Conv2d((1 + double_z) * latent_channels, dim, 1)
        self.post_quant_conv = nn.Conv2d(dim, latent_channels, 1)
        self.decoder = Decoder(latent_channels, out_channels, tuple(up), **shared)

    @property
    def quantizer(self) -> Quantizer:
        """What makes tokens of latents."""
        return self._modules["quantizer"]  # type: ignore[return-value]  # Diffusers would answer with the setting

    @property
    def stride(self) -> int:
        """Pixels to a token, along a side."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    # -- pictures to tokens and back ----------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Quantized:
        """Quantized latents of pictures ``(B, C, H, W)``: ``z_q`` ``(B, D, h, w)`` and ``indices`` ``(B, h, w)``.

        Raises:
            ValueError: another number of channels; sides that are no multiple of ``stride`` and may not be padded.
        """
        return self.quantizer(self.latents(x))

    def latents(self, x: Tensor) -> Tensor:
        """What is quantized, ``(B, D, h, w)``; errors as those of :meth:`encode`."""
        return self.quant_conv(self.encoder(self._padded(x)))

    def decode(self, z_q: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Pictures ``(B, C, H, W)`` of codes ``(B, D, h, w)``, cut to ``size``, height and width, where it is given.

        Raises:
            ValueError: codes of another shape or number of channels; a size that is not within the last token.
        """
        dim = self.post_quant_conv.in_channels
        if z_q.ndim != 4 or z_q.shape[1] != dim:
            raise ValueError(f"codes of shape {tuple(z_q.shape)}; accepted are (B, {dim}, h, w)")
        pictures = self.decoder(self.post_quant_conv(z_q.to(self.post_quant_conv.weight.dtype)))
        if size is None:
            return pictures
        grid = tuple(-(-side // self.stride) for side in size)
        if grid != tuple(z_q.shape[-2:]):
            raise ValueError(f"size={tuple(size)} is of {grid[0]} x {grid[1]} tokens, not {tuple(z_q.shape[-2:])}")
        return pictures[..., : size[0], : size[1]]

    def decode_tokens(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Pictures of ``indices`` ``(B, h, w)``, or ``(B, N)`` of a square: what :meth:`decode` makes of their codes.

        Raises:
            ValueError: indices out of range or of another shape.
        """
        own = len(self.quantizer.indices_shape)
        if indices.ndim == 2 + own:
            side = round(indices.shape[1] ** 0.5)
            if side * side != indices.shape[1]:
                raise ValueError(f"{indices.shape[1]} tokens are no square: give (B, h, w)")
            indices = indices.unflatten(1, (side, side))
        return self.decode(self.quantizer.codes_from_indices(indices), size)

    def forward(self, x: Tensor) -> Reconstruction:
        """Pictures ``(B, C, H, W)`` and what is left of them."""
        quantized = self.encode(x)
        return Reconstruction(self.decode(quantized.z_q, (x.shape[-2], x.shape[-1])), quantized)

    def _padded(self, x: Tensor) -> Tensor:
        stride, mode, channels = self.stride, self.config["pad_mode"], self.config["in_channels"]
        if x.ndim != 4 or x.shape[1] != channels or not x.numel() or not x.is_floating_point():
            raise ValueError(
                f"pictures of shape {tuple(x.shape)}, {x.dtype}; accepted are floats (B, {channels}, H, W), at least "
                "one"
            )
        below, right = (-side % stride for side in x.shape[-2:])
        if not below and not right:
            return x
        if mode is None:
            raise ValueError(
                f"pictures of {x.shape[-2]} x {x.shape[-1]} pixels: pad_mode=None accepts multiples of {stride}"
            )
        if mode == "reflect" and (below >= x.shape[-2] or right >= x.shape[-1]):
            raise ValueError(
                f"pictures of {x.shape[-2]} x {x.shape[-1]} pixels are too small for pad_mode='reflect'; accepted is "
                "'replicate'"
            )
        return F.pad(x, (0, right, 0, below), mode=mode)

    # -- from and to others -------------------------------------------------------------------------------------

    def bake(self) -> "ImageTokenizer":
        """A copy in eval mode whose quantizer has left behind what only training needs; its indices are the same."""
        baked = copy.deepcopy(self)
        baked.quantizer = self.quantizer.bake()  # type: ignore[misc]
        baked.register_to_config(quantizer=_settings(baked.quantizer))
        return baked.eval()

    @classmethod
    def from_autoencoder(
        cls, vae: AutoencoderKL | VQModel, quantizer: dict[str, Any] | None = None
    ) -> "ImageTokenizer":
        """A tokenizer of Diffusers' autoencoder with its weights, between which there is a new quantizer.

        The 1 x 1 convolutions keep their weights where they fit: those of a ``VQModel`` whose codes have ``dim``
        channels, and those of an ``AutoencoderKL`` whose latents have, which then is as it was but for the
        quantization of its mean.

        Args:
            quantizer: settings; by default, of a ``VQModel``, plain VQ with its codes.

        Raises:
            ValueError: no quantizer for an ``AutoencoderKL``; another class; a ``VQModel`` with spatial norm.
        """
        if not isinstance(vae, (AutoencoderKL, VQModel)):
            raise ValueError(f"vae={type(vae).__name__}: accepted are AutoencoderKL and VQModel")
        config, is_vq = vae.config, isinstance(vae, VQModel)
        if is_vq and config.norm_type != "group":
            raise ValueError(f"norm_type={config.norm_type!r}: accepted is 'group'")
        if quantizer is None and not is_vq:
            raise ValueError("quantizer=None: an AutoencoderKL has no codes; say what quantizes its latents")
        own = dict(kind="vq", codebook_size=config.num_vq_embeddings, dim=vae.quantize.vq_embed_dim) if is_vq else {}
        made = cls(quantizer or own, **{name: config[name] for name in _SHARED}, double_z=not is_vq)
        made.encoder.load_state_dict(vae.encoder.state_dict())
        made.decoder.load_state_dict(vae.decoder.state_dict())
        with torch.no_grad():
            before = made.quant_conv.in_channels
            eye = torch.eye(before)[: config.latent_channels, :, None, None], torch.zeros(config.latent_channels)
            for name, new in (("quant_conv", made.quant_conv), ("post_quant_conv", made.post_quant_conv)):
                old = getattr(vae, name, None)
                weight, bias = (old.weight, old.bias) if old is not None else (eye[0][:, : new.in_channels], eye[1])
                # The first half of what a KL autoencoder puts out is the mean.
                weight = weight if is_vq else weight[: config.latent_channels]
                if new.weight.shape == weight.shape:
                    new.weight.copy_(weight)
                    new.bias.copy_(bias[: len(weight)])
            if quantizer is None:
                made.quantizer.embedding.copy_(vae.quantize.embedding.weight)
        return made

    def to_vq_model(self) -> VQModel:
        """Diffusers' ``VQModel`` of the same weights, which decodes these tokens alike.

        Its own search is inexact where codes are almost equally near, and it does not pad.

        Raises:
            ValueError: codes are not the rows of one table, searched by distance; an encoder of twice the channels.
        """
        baked = self.quantizer.bake()
        if _kind(baked) != "vq" or baked.config.measure != "euclidean" or self.config["double_z"]:
            raise ValueError(
                f"quantizer={self.config['quantizer']}, double_z={self.config['double_z']}: VQModel knows one table of "
                "codes, measure='euclidean', and double_z=False"
            )
        shared = {name: self.config[name] for name in _SHARED} | {
            "down_block_types": [type(b).__name__ for b in self.encoder.down_blocks],
            "up_block_types": [type(b).__name__ for b in self.decoder.up_blocks],
        }
        made = VQModel(
            **shared, num_vq_embeddings=baked.codebook_size, vq_embed_dim=baked.dim, lookup_from_codebook=True
        )
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("quantizer.")}
        made.load_state_dict(state | {"quantize.embedding.weight": baked.codebook()})
        return made.eval()


def _make(settings: dict[str, Any]) -> Quantizer:
    given = dict(settings)
    return quantizers.make(given.pop("kind"), **given)


def _kind(quantizer: Quantizer) -> str:
    return type(quantizer).__module__.rpartition(".")[2]


def _settings(quantizer: Quantizer) -> dict[str, Any]:
    """What :func:`_make` makes a quantizer like this one of: all that was set, a seed of 0 as well."""
    return {"kind": _kind(quantizer), **quantizer.config.model_dump(mode="json", exclude_unset=True)}


def _seeded(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with a seed drawn from torch's random state where one is taken and none given."""
    settings = dict(settings)
    if isinstance(settings.get("quantizer"), dict):
        settings["quantizer"] = _seeded(settings["quantizer"])
        return settings
    kind = settings.get("kind", "vq")  # as parts of another quantizer have it
    cls = lookup("genkit.quantizers", Quantizer, kind, setting="quantizer.kind")
    if "seed" in cls.Config.model_fields and "seed" not in settings:
        settings["seed"] = int(torch.randint(2**31, ()))
    return settings
