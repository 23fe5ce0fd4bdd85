"""Readout heads: small networks that read a property of the picture off a frozen denoiser's features."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.denoisers.base import Condition, Denoiser, Prediction
from genkit.denoisers.flux import Flux
from genkit.denoisers.network import adapter_of, unwrap
from genkit.registry import unknown

SAMPLE = "sample"
KINDS = ("spatial", "feature")
TEMB_CONVENTIONS = ("timestep", "reversed", "none")
# A decoder's second convolutions, before the residual sum; the same place of transformers, where a block adds what it
# has computed of the picture's tokens to its input.
_DECODER = r"up_blocks\.\d+\.resnets\.\d+\.conv2"
_TRANSFORMER = r"(transformer_blocks\.\d+\.ff|single_transformer_blocks\.\d+\.proj_out|blocks\.\d+\.fc2)"


class ReadoutBlock(nn.Module):
    """Bottleneck ``d -> P/4 -> P/4 -> P`` with a shortcut, the timestep added after the first convolution."""

    def __init__(self, channels: int, width: int, groups: int, time_channels: int | None):
        super().__init__()
        narrow = width // 4
        self.conv1 = _convolution(channels, narrow, 1, groups)
        self.conv2 = _convolution(narrow, narrow, 3, groups)
        self.conv3 = _convolution(narrow, width, 1, groups)
        self.shortcut = nn.Identity() if channels == width else _convolution(channels, width, 1, groups)
        self.time = None if time_channels is None else nn.Linear(time_channels, narrow)

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = F.relu(self.conv1(x))
        if self.time is not None and temb is not None:
            h = h + F.relu(self.time(temb))[:, :, None, None]
        h = self.conv3(F.relu(self.conv2(h)))
        return F.relu(h + self.shortcut(x))


class ReadoutHead(ModelMixin, ConfigMixin):
    """``sum_l softmax(m)_l block_l(f_l, temb)``, for spatial heads followed by three convolutions and ``tanh``.

    The features ``f_l`` ``(B, d_l, h', w')``, or tokens ``(B, N, d_l)``, are brought to the grid of the latents. With
    ``P = 384`` and the decoder of SDXL a spatial head has 5,907,436 weights and a feature head 5,427,945.

    Args:
        at: names of the denoiser's sub-modules whose outputs are read; ``sample`` is the clean sample that it
            predicts, which any denoiser has.
        channels: ``d_l``, a number for each.
        kind: ``spatial``, a map ``(B, out_channels, h, w)`` in [-1, 1]; or ``feature``, ``(B, P, h, w)``.
        out_channels: of a spatial map.
        projection_dim: ``P``, a multiple of 12.
        norm_num_groups: of every group norm; divides ``P / 4``.
        time_module: name of the sub-module whose output embeds the timestep; ``None``: no weights for it.
        time_channels: size of that embedding.
        temb_convention: which embedding the blocks get: that of the ``timestep``; ``reversed``, that of
            ``num_train_timesteps - 1 - timestep`` (heads released with the paper were trained on it, and guided with
            the other); or ``none``.
        patch_size: side of a token in latents; tokens are rows of patches, after those of a text where there are any.

    Raises:
        ValueError: not one channel count a module, or a setting that is not one of those named here.

    Source: Luo et al., "Readout guidance: learning control from diffusion features", arXiv 2312.02150.
    """

    @register_to_config
    def __init__(
        self,
        at: Sequence[str],
        channels: Sequence[int],
        kind: str = "spatial",
        out_channels: int = 3,
        projection_dim: int = 384,
        norm_num_groups: int = 32,
        time_module: str | None = None,
        time_channels: int = 1280,
        temb_convention: str = "timestep",
        patch_size: int = 1,
    ):
        super().__init__()
        if not at or len(at) != len(channels):
            raise ValueError(f"at={list(at)} and channels={list(channels)}: accepted is one number for each module")
        if kind not in KINDS:
            raise ValueError(unknown("kind", kind, KINDS))
        if temb_convention not in TEMB_CONVENTIONS:
            raise ValueError(unknown("temb_convention", temb_convention, TEMB_CONVENTIONS))
        if projection_dim % 12 or (projection_dim // 4) % norm_num_groups:
            raise ValueError(
                f"projection_dim={projection_dim}, norm_num_groups={norm_num_groups}: accepted are multiples of 12 "
                "whose quarter the groups divide"
            )
        time = None if time_module is None else time_channels
        self.blocks = nn.ModuleList(ReadoutBlock(d, projection_dim, norm_num_groups, time) for d in channels)
        self.mixing = nn.Parameter(torch.ones(len(channels)))
        wide, narrow = projection_dim // 3, projection_dim // 12
        self.output = (
            nn.Identity()
            if kind == "feature"
            else nn.Sequential(
                nn.Conv2d(projection_dim, wide, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(wide, narrow, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(narrow, out_channels, 1),
                nn.Tanh(),
            )
        )

    @classmethod
    def for_network(cls, network: nn.Module, modules: Sequence[tuple[str, int]] | None = None, **settings):
        """A new head for ``network``, reading ``modules`` (by default all that :func:`readable` lists)."""
        modules = readable(network) if modules is None else modules
        time_module, time_channels = _time_module(unwrap(network))
        made: dict[str, Any] = {
            "time_module": time_module,
            "time_channels": time_channels,
            "patch_size": _patch_size(network),
        }
        return cls([name for name, _ in modules], [d for _, d in modules], **made | settings)

    @property
    def time_key(self) -> tuple[str, str] | None:
        """The embedding that the blocks are given: name of its module, and which of the conventions."""
        name, convention = self.config.time_module, self.config.temb_convention
        return None if name is None or convention == "none" else (name, convention)

    def read(self, captured: "Captured", size: tuple[int, int]) -> Tensor:
        """The readout of what :func:`capture` gave, on a grid of ``size`` ``(h, w)``."""
        temb = None if self.time_key is None else captured.times[self.time_key]
        return self([captured.features[name] for name in self.config.at], temb, size)

    def forward(self, features: Sequence[Tensor], temb: Tensor | None, size: tuple[int, int]) -> Tensor:
        """The readout ``(B, out_channels or P, h, w)``.

        Args:
            features: in the order of ``at``.
            temb: ``(B, time_channels)``, or ``None`` to leave the timestep out.
            size: ``(h, w)``, the grid of the latents.
        """
        temb = None if temb is None else temb.to(self.mixing)
        total: Any = 0
        for weight, block, feature in zip(self.mixing.softmax(0), self.blocks, features, strict=True):
            grid = on_grid(feature.to(self.mixing), size, self.config.patch_size)
            total = total + weight * block(grid, temb)
        return self.output(total)


def _convolution(channels: int, out: int, kernel: int, groups: int) -> nn.Sequential:
    layer = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.GroupNorm(groups, out))


def on_grid(feature: Tensor, size: tuple[int, int], patch_size: int) -> Tensor:
    """A feature as a map ``(B, d, h, w)``: maps are resized, tokens laid out in rows of patches, vectors are one pixel.

    Raises:
        ValueError: fewer tokens than patches.
    """
    if feature.ndim == 2:
        feature = feature[:, :, None, None]
    if feature.ndim == 3:
        rows, columns = size[0] // patch_size, size[1] // patch_size
        if feature.shape[1] < rows * columns:
            raise ValueError(
                f"patch_size={patch_size}: {tuple(size)} latents have {rows * columns} patches, the network "
                f"{feature.shape[1]} tokens"
            )
        feature = feature[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
    if feature.shape[-2:] == tuple(size):
        return feature
    return F.interpolate(feature, size=size, mode="bilinear", align_corners=False)


def readable(network: nn.Module) -> list[tuple[str, int]]:
    """``(name, channels)`` of the sub-modules of ``network`` that heads read: its decoder's residual blocks, or every
    transformer block.

    Raises:
        ValueError: neither is found.
    """
    modules = dict(unwrap(network).named_modules())
    for rule in (_DECODER, _TRANSFORMER):
        found = [(name, _width(module)) for name, module in modules.items() if re.fullmatch(rule, name)]
        if found:
            return found
    raise ValueError(
        f"network={type(unwrap(network)).__name__} has neither up_blocks of residual blocks nor transformer blocks; "
        "name the modules to read and their channels"
    )


def _width(module: nn.Module) -> int:
    last = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
    return last.out_channels if isinstance(last, nn.Conv2d) else last.out_features


def _time_module(network: nn.Module) -> tuple[str | None, int]:
    for name, module in network.named_modules():
        if isinstance(module, TimestepEmbedding):
            return name, module.linear_2.out_features
    own = getattr(network, "time_embed", None)
    return ("time_embed", own.out_features) if isinstance(own, nn.Linear) else (None, 1280)


def _patch_size(network: nn.Module) -> int:
    if adapter_of(network) is Flux:
        return 2  # which its pipeline packs
    return getattr(getattr(unwrap(network), "config", None), "patch_size", None) or 1


@dataclass
class Captured:
    """What heads read of one call of a denoiser: ``features`` by module, ``times`` by :attr:`ReadoutHead.time_key`."""

    features: Mapping[str, Tensor]
    times: Mapping[tuple[str, str], Tensor]


def capture(
    denoiser: Denoiser,
    heads: Iterable[ReadoutHead],
    z: Tensor,
    t: Tensor,
    condition: Condition | None = None,
    *,
    timestep: Tensor | None = None,
) -> tuple[Prediction, Captured]:
    """One call of ``denoiser`` and all that ``heads`` read of it; gradients reach ``z`` through the features.

    Raises:
        ValueError: a module that the network does not have or does not run.
    """
    heads = list(heads)
    names = list(dict.fromkeys(name for head in heads for name in head.config.at))
    keys = list(dict.fromkeys(head.time_key for head in heads if head.time_key is not None))
    plain = [name for name, convention in keys if convention == "timestep"]
    modules = [name for name in names if name != SAMPLE] + plain
    prediction, outputs = denoiser.features(z, t, condition, modules, timestep=timestep)
    seen = dict(zip(modules, outputs, strict=True))
    if SAMPLE in names:
        seen[SAMPLE] = prediction.sample
    times = {(name, "timestep"): seen[name].detach() for name in plain}
    native = denoiser.interpolant.timestep(t) if timestep is None else timestep
    for name, convention in keys:
        if convention == "reversed":
            times[name, convention] = _reversed_embedding(denoiser, name, native, z)
    return prediction, Captured({name: seen[name] for name in names}, times)


@torch.no_grad()
def _reversed_embedding(denoiser: Denoiser, name: str, timestep: Tensor, z: Tensor) -> Tensor:
    network = unwrap(denoiser.network)
    embedding: Any = network.get_submodule(name)
    parent: Any = network.get_submodule(name.rpartition(".")[0])
    steps = getattr(denoiser.interpolant, "num_train_timesteps", None)
    if steps is None or not hasattr(parent, "time_proj"):
        raise ValueError(
            f"temb_convention='reversed': {type(network).__name__} on {type(denoiser.interpolant).__name__} numbers no "
            "timesteps or has no time_proj beside its time embedding"
        )
    mirrored = steps - 1 - torch.as_tensor(timestep, device=z.device).expand(len(z))
    weight = next(embedding.parameters())
    return embedding(parent.time_proj(mirrored).to(weight.dtype))


def from_released(state: Mapping[str, Tensor], network: nn.Module, **settings) -> ReadoutHead:
    """The head in ``state``, weights released with the paper, for ``network`` (an SD 1.5 or SDXL UNet).

    The files hold ``torch.save``'s format; read them with ``torch.load(file, weights_only=True)`` and pass the entry
    ``aggregation_network``. Heads whose blocks were wrapped in a sequence never saw a timestep, so their
    ``temb_convention`` is ``none``; for others compare ``timestep`` with ``reversed`` on a labelled image.

    Raises:
        ValueError: weights that are no such head, or that of a network with other channels.
    """
    names = {_converted(key): tensor for key, tensor in state.items()}
    count = len({name.split(".")[1] for name in names if name.startswith("blocks.")})
    channels = [names[f"blocks.{i}.conv1.0.weight"].shape[1] for i in range(count)]
    modules = readable(network)
    if channels != [d for _, d in modules]:
        raise ValueError(
            f"state reads features of {channels} channels, network={type(unwrap(network)).__name__} has "
            f"{[d for _, d in modules]}"
        )
    spatial = "output.4.weight" in names
    made: dict[str, Any] = {
        "kind": "spatial" if spatial else "feature",
        "projection_dim": names["blocks.0.conv3.0.weight"].shape[0],
    }
    if spatial:
        made["out_channels"] = names["output.4.weight"].shape[0]
    if any(re.match(r"bottleneck_layers\.\d+\.0\.", key) for key in state):
        made["temb_convention"] = "none"
    head = ReadoutHead.for_network(network, modules, **made | settings)
    head.load_state_dict(names)
    return head


def _converted(key: str) -> str:
    name = re.sub(r"^bottleneck_layers\.(\d+)\.(0\.)?", r"blocks.\1.", key)
    name = re.sub(r"\.(conv[123]|shortcut)\.(weight)$", r".\1.0.\2", name)
    name = re.sub(r"\.(conv[123]|shortcut)\.norm\.", r".\1.1.", name)
    name = name.replace(".emb_layers.", ".time.")
    name = re.sub(r"^mixing_weights$", "mixing", re.sub(r"^output_head\.", "output.", name))
    if not re.match(r"blocks\.\d+\.(conv[123]|shortcut|time)\.|mixing$|output\.[024]\.", name):
        raise ValueError(f"state has {key!r}, which no released readout head has")
    return name
