"""Any denoiser as a flow map: a second time, added to the network's time embedding."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from genkit._diffusers import set_config
from genkit.denoisers.base import Condition, FlowMap
from genkit.denoisers.network import NetworkDenoiser
from genkit.denoisers.scalars import told, without


class GapEmbedder(ModelMixin, ConfigMixin):
    """``W2 silu(W1 [1 - cos(f g), sin(f g)])`` of the gap ``g = t - s``; 0 at ``g = 0``; 0 for all before training.

    To it is added as much of every scalar, by weights of its own.

    Args:
        dim: of the embedding that it is added to.
        num_frequencies: how many ``f``, log-spaced from ``max_frequency`` down to 1e-4 radians per unit of time. Times
            are not multiplied by 1000: high frequencies make ``du/ds`` explode.
        scalars: further numbers of order 1 that are embedded, by name, with their defaults; see
            :meth:`genkit.denoisers.base.FlowMap.add_scalars`.

    Source: Boffi et al., "How to build a consistency model", arXiv 2505.18825 (gap as the second time).
    """

    @register_to_config
    def __init__(
        self,
        dim: int,
        num_frequencies: int = 32,
        max_frequency: float = 1.0,
        scalars: dict[str, float] | None = None,
    ):
        super().__init__()
        self.hidden = nn.Linear(2 * num_frequencies, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)
        self.scalar_embedders = nn.ModuleDict()
        self.add_scalars(scalars or {})

    def add_scalars(self, scalars: Mapping[str, float]) -> None:
        """See :meth:`genkit.denoisers.base.FlowMap.add_scalars`."""
        for name in scalars:
            if name not in self.scalar_embedders:
                one = GapEmbedder(*(self.config[k] for k in ("dim", "num_frequencies", "max_frequency")))
                self.scalar_embedders[name] = one.to(self.hidden.weight)
        if scalars:
            set_config(self, scalars={**(self.config["scalars"] or {}), **scalars})

    def forward(self, gap: Tensor, scalars: Mapping[str, Tensor] | None = None) -> Tensor:
        """Gaps ``(B,)`` in float32 at least, and every scalar, ``(B,)`` each -> ``(B, dim)``."""
        exponent = torch.linspace(0, 1, self.config["num_frequencies"], dtype=gap.dtype, device=gap.device)
        angle = gap[:, None] * self.config["max_frequency"] * (1e-4 / self.config["max_frequency"]) ** exponent
        # 1 - cos, without its cancellation at small angles.
        features = torch.cat((2 * torch.sin(angle / 2) ** 2, torch.sin(angle)), dim=-1)
        embedding = self.out(nn.functional.silu(self.hidden(features.to(self.hidden.weight.dtype))))
        for name, embedder in self.scalar_embedders.items():
            embedding = embedding + embedder(scalars[name])  # type: ignore[index]
        return embedding


class TwoTimeNetwork(nn.Module):
    """A network and its gap embedder as one module: what is trained, averaged, wrapped and saved.

    Called outside :meth:`at_gap`, ``network`` is as it was before.
    """

    def __init__(self, network: nn.Module, time_modules: list[nn.Module], gap_embedder: GapEmbedder):
        super().__init__()
        self.network: Any = network
        self.gap_embedder = gap_embedder
        self._embedding: Tensor | None = None
        for module in time_modules:
            module.register_forward_hook(self._add)

    def _add(self, module, inputs, output: Tensor) -> Tensor:
        return output if self._embedding is None else output + self._embedding.to(output.dtype)

    @contextmanager
    def at_gap(self, gap: Tensor, scalars: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Within, the time embedding is that of ``t`` plus that of ``gap`` ``(B,)`` and of ``scalars``."""
        with self._added(self.gap_embedder(gap, scalars)):
            yield

    @contextmanager
    def _added(self, embedding: Tensor | None) -> Iterator[None]:
        before, self._embedding = self._embedding, embedding
        try:
            yield
        finally:
            self._embedding = before

    def enable_gradient_checkpointing(self) -> None:
        """As Diffusers' method of this name, remembering the gap: ``backward`` runs the blocks again after the call."""

        self.network.enable_gradient_checkpointing(self._checkpoint)

    def disable_gradient_checkpointing(self) -> None:
        self.network.disable_gradient_checkpointing()

    def _checkpoint(self, block, *inputs):
        embedding = self._embedding

        def run(*inputs):
            with self._added(embedding):
                return block(*inputs)

        return checkpoint(run, *inputs, use_reentrant=False)


class TwoTime(FlowMap):
    """The flow map ``u(x, t, s)`` made of a denoiser of one time; before training ``u(x, t, s) = v(x, t)`` bit for bit.

    The network sees ``embedding(t) + gap_embedder(t - s, scalars)``. Its output, of whichever prediction type, is read
    as an average velocity with the coefficients of ``t``.

    Args:
        denoiser: the teacher's adapter. Its network is *not* copied: outside of this flow map it stays what it was.
        gap_embedder: a trained one, or ``None`` for a new one.

    Raises:
        TypeError: a denoiser of a plain function.
        ValueError: a network that names no time embedding, or a compiled one.
    """

    network: TwoTimeNetwork

    def __init__(self, denoiser: NetworkDenoiser, gap_embedder: GapEmbedder | None = None):
        if not isinstance(denoiser, NetworkDenoiser):
            raise TypeError(f"{type(denoiser).__name__} is no adapter of a network; use a FunctionFlowMap")
        if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in denoiser.network.modules()):
            raise ValueError(
                "denoiser.network is compiled, and a compiled network skips the hooks through which it gets the gap; "
                "give TwoTime the network as it was before torch.compile"
            )
        modules = [denoiser.inner.get_submodule(name) for name in denoiser.time_modules()]
        if gap_embedder is None:
            embedding = next(m for m in modules[0].modules() if isinstance(m, TimestepEmbedding))
            weight = next(embedding.parameters())
            gap_embedder = GapEmbedder(embedding.linear_2.out_features).to(weight.device)
        super().__init__(
            TwoTimeNetwork(denoiser.network, modules, gap_embedder), denoiser.interpolant, "flow_prediction"
        )
        self.denoiser = denoiser
        if getattr(denoiser.inner, "is_gradient_checkpointing", False):
            self.network.enable_gradient_checkpointing()

    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self._average_velocity(z, t, t, timestep, condition)

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        return self._average_velocity(x, t, s, self.interpolant.timestep(t), condition)

    def _average_velocity(self, x, t, s, timestep, condition):
        differentiating = torch._C._functorch.maybe_current_level() is not None
        self._check_checkpointing(differentiating)
        # Fused attention kernels have no forward-mode derivative.
        attention = sdpa_kernel(SDPBackend.MATH) if differentiating else nullcontext()
        condition = condition or Condition()
        with attention, self.network.at_gap(t - s, told(condition, self.scalars, t)):
            raw = self.denoiser.forward(x, t, timestep, without(condition, self.scalars))
        return self.interpolant.convert(raw, self.denoiser.prediction_type, self.prediction_type, x, t)

    def _check_checkpointing(self, differentiating: bool) -> None:
        if not torch.is_grad_enabled():
            return
        active = [m for m in self.denoiser.inner.modules() if getattr(m, "gradient_checkpointing", False)]
        if active and differentiating:
            raise ValueError(
                "gradient checkpointing is on, and torch.func.jvp cannot go through it; call "
                "disable_gradient_checkpointing() on the network, or use a method without jvp (PSD, finite differences)"
            )
        if any(m._gradient_checkpointing_func != self.network._checkpoint for m in active):
            raise ValueError(
                "gradient checkpointing was switched on behind the flow map, so that backward would recompute blocks "
                "without the gap; call flow_map.network.enable_gradient_checkpointing(), not the inner network's"
            )

    @property
    def scalars(self) -> Mapping[str, float]:
        return self.network.gap_embedder.config["scalars"] or {}

    def add_scalars(self, scalars: Mapping[str, float]) -> None:
        self.network.gap_embedder.add_scalars(scalars)

    def embedders(self) -> list[nn.Module]:
        return [self.network.gap_embedder]

    def encode(self, pipe, **inputs) -> Condition:
        """The condition that ``pipe`` would make of ``inputs``; see the adapter's."""
        return self.denoiser.encode(pipe, **inputs)

    def _submodules(self) -> dict[str, nn.Module]:
        return self.denoiser._submodules()
