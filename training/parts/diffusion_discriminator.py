"""A diffusion network as judge of samples at any noise: frozen, cut off behind its middle, with a LoRA and a head."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from genkit.denoisers.base import Denoiser
from genkit.denoisers.flux import Flux
from genkit.denoisers.network import unwrap
from genkit.networks.discriminator_head import DiscriminatorHead
from genkit.networks.fixed_condition import FixedCondition
from genkit.networks.readout_head import readable
from genkit.training.adapters import add_lora

Adapter = Literal["shared", "reencode"]


class Lora(BaseModel):
    """Low-rank updates of the judge: settings as those of ``adapter``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: int = Field(16, ge=1)
    alpha: float = Field(16, gt=0)
    target_modules: list[str] | None = None


class Head(BaseModel):
    """Settings of :class:`genkit.networks.discriminator_head.DiscriminatorHead`; ``at`` unset: where the network ends.

    A transformer is read at up to four of the blocks that are left, a UNet at its bottleneck.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    at: list[str] | None = Field(None, min_length=1)
    hidden_size: int = Field(256, ge=1)
    num_layers: int = Field(2, ge=1)
    stride: Literal[1, 2] = 1
    norm_num_groups: int = Field(32, ge=1)


class DiffusionDiscriminator(nn.Module):
    """``D(x_t, t)``: logits ``(B, K)`` of the places of a noised sample, positive where it looks real.

    The denoiser's network is taken over: its later part is removed (the decoder of a UNet; of a transformer the blocks
    after the first ``depth``), what is left is frozen in eval mode, and a call ends with the last module that the head
    reads. The LoRA and the head, in float32, are all that trains.

    Args:
        denoiser: the judge, which nobody else uses.
        condition: what it is told of every sample.
        depth: blocks of a transformer that are kept; by default the first half. A UNet has no such choice.
        lora: ``None``: only the head trains.
        head: of the head.
        dtype: of the frozen weights.

    Raises:
        ValueError: a depth that the network does not have; a module to read that is not there or does not run.

    Source: Li et al., "Distillation-free one-step diffusion for real-world image super-resolution", arXiv 2410.04224.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: FixedCondition,
        *,
        depth: int | None = None,
        lora: Lora | None,
        head: Head,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.denoiser, self.condition = denoiser, condition
        self.network = denoiser.module.requires_grad_(False)
        if dtype != torch.float32:
            self.network.to(dtype)
        network = unwrap(self.network)
        _cut(network, depth)
        # Before the LoRA, whose layers would be taken for the network's own.
        self.head = DiscriminatorHead.for_network(network, **head.model_dump())
        self._ends = _last(network, self.head.config["at"])
        if lora is not None:
            add_lora(denoiser, lora)
            for parameter in self.network.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.train()

    def train(self, mode: bool = True) -> "DiffusionDiscriminator":
        """The head's mode; the network stays in eval mode, without dropout."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits of ``x`` ``(B, ...)``, noised to ``t`` ``(B,)`` on the judge's path (see :meth:`noised`)."""
        at = list(self.head.config["at"])
        modules = dict(unwrap(self.network).named_modules())
        with _stopping([modules[name] for name in at], modules[self._ends]) as seen:
            try:
                self.denoiser(x, t, self.condition(len(x)))
            except _Stop:
                pass
        silent = [name for name in at if modules[name] not in seen]
        if silent:
            raise ValueError(f"head.at={silent} did not run before {self._ends!r}")
        return self.head([seen[modules[name]] for name in at])

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``F(x0, t) = alpha x0 + sigma eps`` on the judge's path."""
        return self.denoiser.interpolant.interpolate(x0, eps, t)


class _Stop(Exception):
    pass


@contextmanager
def _stopping(modules: Sequence[nn.Module], last: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """The outputs of ``modules`` by module; the call ends by an exception behind ``last``."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(module, _inputs, output):
        seen[module] = output[0] if isinstance(output, (tuple, list)) else output
        if module is last:
            raise _Stop

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _cut(network: Any, depth: int | None) -> None:
    """Remove what comes after the middle of a UNet, or after ``depth`` blocks of a transformer."""
    if getattr(network, "mid_block", None) is not None:
        if depth is not None:
            raise ValueError(f"depth={depth}: {type(network).__name__} is cut behind its bottleneck; leave depth unset")
        network.up_blocks = nn.ModuleList()
        return
    blocks = [name.rpartition(".")[0] for name, _ in readable(network)]
    depth = max(1, len(blocks) // 2) if depth is None else depth
    if not 1 <= depth <= len(blocks):
        raise ValueError(f"depth={depth}: {type(network).__name__} has {len(blocks)} blocks")
    for name in dict.fromkeys(block.rpartition(".")[0] for block in blocks):
        kept = sum(block.rpartition(".")[0] == name for block in blocks[:depth])
        setattr(network, name, getattr(network, name)[:kept])


def _last(network: nn.Module, at: Sequence[str]) -> str:
    """The name in ``at`` that stands last in the network; its parts stand in the order in which they run."""
    order = [name for name, _ in network.named_modules() if name in at]
    # A UNet registers its middle after its decoder.
    return "mid_block" if "mid_block" in order else order[-1]


# -- two autoencoders -----------------------------------------------------------------------------------------------


def latent_adapter(wanted: Adapter | None, own: Any, judges: Any) -> Adapter:
    """How the judge sees the generator's samples: its latents as they are, or decoded and encoded anew.

    Args:
        wanted: the setting; ``None`` accepts ``shared`` where both have the same autoencoder, or none.
        own, judges: the autoencoders of generator and judge.

    Raises:
        ValueError: different ones and no choice made.
    """
    if wanted is not None:
        return wanted
    if own is None and judges is None or own is not None and judges is not None and _same(own, judges):
        return "shared"
    names = [
        "none" if vae is None else f"{type(vae).__name__}(scaling_factor={vae.config.scaling_factor:g})"
        for vae in (own, judges)
    ]
    raise ValueError(
        f"latent_adapter=None: the generator's autoencoder ({names[0]}) is not the judge's ({names[1]}); set "
        "latent_adapter to reencode, which decodes samples and encodes them by the judge's, or, if you know that both "
        "have one latent space, to shared"
    )


def _same(own: Any, judges: Any) -> bool:
    """Whether they have the same weights and standardise latents alike."""
    keys = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    if any(own.config.get(key) != judges.config.get(key) for key in keys):
        return False
    a, b = own.state_dict(), judges.state_dict()
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k].to(a[k])) for k in a)


def check_judge(judge: Denoiser, channels: int, folder: str) -> None:
    """Refuse a judge that takes latents of other channels.

    Raises:
        ValueError: it does.
    """
    network: Any = unwrap(judge.module)
    takes = network.config.in_channels // (4 if isinstance(judge, Flux) else 1)
    if takes != channels:
        raise ValueError(
            f"judge={folder!r} takes samples of {takes} channels, it would be given {channels}; choose another judge, "
            "or latent_adapter=reencode where it has an autoencoder of its own"
        )
