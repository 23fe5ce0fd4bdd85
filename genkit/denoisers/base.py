"""One call for every network: ``denoiser(z, t, condition) -> Prediction``.

All of a network's oddities (packing, time ids, guidance embedding, scaling of timesteps) stop in its adapter.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from genkit.interpolants import Interpolant, check_prediction_type, expand


@dataclass(frozen=True)
class Condition:
    """What a batch of samples is generated under, and what "no condition" means for it.

    Args:
        values: named tensors with the batch first (``class_labels`` ``(B,)``, ``prompt_embeds`` ``(B, L, D)`` ...).
        null_values: the same names for the unconditional branch; ``None`` where the model has no such branch.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    null_values: Mapping[str, Tensor] | None = None

    def __post_init__(self):
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))
        if self.null_values is not None:
            if set(self.null_values) != set(self.values):
                raise ValueError(
                    f"null_values names {sorted(self.null_values)}, values {sorted(self.values)}; they must agree"
                )
            object.__setattr__(self, "null_values", MappingProxyType(dict(self.null_values)))
        sizes = {name: len(v) for part in (self.values, self.null_values or {}) for name, v in part.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the tensors of a condition must share one batch size, got {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.values.values()))) if self.values else 0

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def _map(self, fn) -> "Condition":
        null = None if self.null_values is None else {k: fn(v) for k, v in self.null_values.items()}
        return Condition({k: fn(v) for k, v in self.values.items()}, null)

    def null(self) -> "Condition":
        """The unconditional branch of this batch.

        Raises:
            ValueError: the model has none (it was trained without dropping its condition, or was distilled).
        """
        if self.null_values is None:
            raise ValueError("this condition has no unconditional branch (null_values=None); guidance needs one")
        return Condition(self.null_values, self.null_values)

    def repeat(self, n: int) -> "Condition":
        """Every item ``n`` times in a row."""
        return self._map(lambda v: v.repeat_interleave(n, dim=0))

    def index(self, index) -> "Condition":
        """The items at ``index`` (a slice, a list or an int64 tensor)."""
        return self._map(lambda v: v[index])

    def drop(self, mask: Tensor) -> "Condition":
        """The same batch with the items under ``mask`` ``(B,)`` replaced by their unconditional branch."""
        null = self.null().values
        values = {k: torch.where(mask.view(-1, *(1,) * (v.ndim - 1)), null[k], v) for k, v in self.values.items()}
        return Condition(values, self.null_values)

    def with_values(self, values: Mapping[str, Tensor], null_values: Mapping[str, Tensor] | None = None) -> "Condition":
        """The same batch with further tensors, or others of the same names.

        ``null_values`` are those of the unconditional branch, where there is one; by default the same.
        """
        null = (
            None
            if self.null_values is None
            else {**self.null_values, **(values if null_values is None else null_values)}
        )
        return Condition({**self.values, **values}, null)

    def to(self, *args, **kwargs) -> "Condition":
        """Every tensor through ``Tensor.to``; integers keep their type when only a dtype is given."""

        def move(v: Tensor) -> Tensor:
            moved = v.to(*args, **kwargs)
            return moved if v.is_floating_point() else moved.to(v.dtype)

        return self._map(move)

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """The batches one after the other; an unconditional branch survives if every one has it."""
        first = conditions[0]
        values = {k: torch.cat([c.values[k] for c in conditions]) for k in first.values}
        if any(c.null_values is None for c in conditions):
            return Condition(values)
        return Condition(values, {k: torch.cat([c.null_values[k] for c in conditions]) for k in values})  # type: ignore[index]


@dataclass(frozen=True)
class Prediction:
    """A network's output at ``(z, t)`` with views in every parametrisation.

    Args:
        raw: the output, shape of ``z``.
        prediction_type: what ``raw`` is, in Diffusers' words.
        interpolant, z, t: where it was made; ``t`` is ``(B,)`` or ``()``.
    """

    raw: Tensor
    prediction_type: str
    interpolant: Interpolant
    z: Tensor
    t: Tensor

    def as_type(self, prediction_type: str) -> Tensor:
        """The prediction in another parametrisation, in float32 at least unless it is ``raw`` itself."""
        return self.interpolant.convert(self.raw, self.prediction_type, prediction_type, self.z, self.t)

    @cached_property
    def sample(self) -> Tensor:
        """The clean sample ``E[x0 | x_t = z]``."""
        return self.as_type("sample")

    @cached_property
    def epsilon(self) -> Tensor:
        """The noise ``E[eps | x_t = z]``."""
        return self.as_type("epsilon")

    @cached_property
    def velocity(self) -> Tensor:
        """``dx_t/dt`` of the probability-flow ODE at ``z``."""
        return self.as_type("flow_prediction")

    @cached_property
    def score(self) -> Tensor:
        """``grad log p_t(z) = -E[eps | z] / sigma(t)``; infinite at ``t = 0``."""
        epsilon = self.epsilon
        sigma = self.interpolant.sigma(self.t.to(torch.promote_types(epsilon.dtype, torch.float32)))
        return -epsilon / expand(sigma, epsilon)

    def with_raw(self, raw: Tensor) -> "Prediction":
        """The same place, another output of the same type."""
        return replace(self, raw=raw)

    def with_value(self, value: Tensor, prediction_type: str) -> "Prediction":
        """The prediction at the same place that ``value`` of ``prediction_type`` stands for (a velocity, a sample ...).

        Raises:
            ValueError: as :meth:`genkit.interpolants.Interpolant.convert`.
        """
        raw = self.interpolant.convert(value, prediction_type, self.prediction_type, self.z, self.t)
        return self.with_raw(raw.to(self.raw.dtype))

    def moved(self, update: Tensor) -> "Prediction":
        """The prediction whose clean sample is ``sample + update``, formed without going through ``sample``."""
        change = self.interpolant.to_update(update, self.prediction_type, self.t)
        return self.with_raw((self.raw + change).to(self.raw.dtype))

    def index(self, index) -> "Prediction":
        """The items at ``index`` of the batch."""
        t = self.t[index] if self.t.ndim else self.t
        return replace(self, raw=self.raw[index], z=self.z[index], t=t)


class Denoiser(ABC):
    """A network on an interpolant. Subclasses implement :meth:`forward`.

    Attributes:
        interpolant: the path its inputs lie on.
        prediction_type: what its raw output is.
        calls: evaluations so far, one per condition of a batch, wherever they were made in one batch or in several.
        network_classes: names of the Diffusers classes that an adapter is for (see :func:`genkit.denoisers.wrap`).
    """

    network_classes: tuple[str, ...] = ()

    def __init__(self, network, interpolant: Interpolant, prediction_type: str):
        check_prediction_type(prediction_type)
        self.network = network
        self.interpolant = interpolant
        self.prediction_type = prediction_type
        self._count = [0]

    @property
    def calls(self) -> int:
        """Evaluations so far; shared with what :meth:`with_network` makes."""
        return self._count[0]

    @calls.setter
    def calls(self, value: int) -> None:
        self._count[0] = value

    def with_network(self, network) -> "Denoiser":
        """A denoiser for the same inputs around another network (a weaker one, another expert), counted with this one.

        Args:
            network: of any class that can stand here, on the same path and with the same prediction type; or a
                denoiser, which brings its own.
        """
        other = copy.copy(network) if isinstance(network, Denoiser) else self._around(network)
        other._count = self._count
        return other

    def _around(self, network) -> "Denoiser":
        return type(self)(network, self.interpolant, self.prediction_type)

    @property
    def module(self) -> nn.Module:
        """Everything that has weights, as one module: what a trainer optimises and a checkpoint keeps.

        Raises:
            TypeError: the denoiser is a plain function.
        """
        if not isinstance(self.network, nn.Module):
            raise TypeError(f"{type(self.network).__name__} is a plain function: it has no weights to train")
        return self.network

    @abstractmethod
    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Raw output of the network: ``z`` ``(B, ...)``, ``t`` and ``timestep`` ``(B,)``."""

    def encode(self, *args: Any, **inputs: Any) -> Condition:
        """``encode(pipe, ...)``: what ``pipe`` makes of prompts or labels, where the network belongs to a pipeline.

        Raises:
            TypeError: it has none.
        """
        raise TypeError(f"{type(self).__name__} belongs to no pipeline that could encode {sorted(inputs)}")

    def __call__(
        self, z: Tensor, t: Tensor, condition: Condition | None = None, *, timestep: Tensor | None = None
    ) -> Prediction:
        """Evaluate at ``z`` ``(B, ...)`` and ``t`` ``(B,)`` or ``()``.

        ``timestep`` is the native timestep where a scheduler named one; otherwise it is derived from ``t``.
        """
        return self.many(z, t, [condition or Condition()], timestep=timestep)[0]

    def many(
        self, z: Tensor, t: Tensor, conditions: Sequence[Condition], *, timestep: Tensor | None = None
    ) -> list[Prediction]:
        """Evaluate the same ``z`` under several conditions, in one batch of ``len(conditions) * B``."""
        if timestep is None:
            timestep = self.interpolant.timestep(t)
        n = len(conditions)
        self.calls += n
        # The network gets times no wider than it needs; the prediction keeps a scalar on the CPU, where looking at it
        # does not wait for a GPU.
        wide = torch.promote_types(z.dtype, torch.float32)
        times = torch.as_tensor(t, dtype=wide, device=z.device).expand(len(z)).contiguous()
        steps = torch.as_tensor(timestep, device=z.device).expand(len(z)).contiguous()
        t = torch.as_tensor(t, device=z.device if torch.as_tensor(t).ndim else None)
        if n == 1:
            raws: Sequence[Tensor] = [self.forward(z, times, steps, conditions[0])]
        else:
            z_n, times_n, steps_n = (torch.cat([v] * n) for v in (z, times, steps))
            raws = self.forward(z_n, times_n, steps_n, Condition.cat(conditions)).chunk(n)
        return [Prediction(raw, self.prediction_type, self.interpolant, z, t) for raw in raws]

    def features(
        self, z: Tensor, t: Tensor, condition: Condition | None, at: Sequence[str], *, timestep: Tensor | None = None
    ) -> tuple[Prediction, list[Tensor]]:
        """The prediction together with the outputs of the sub-modules named in ``at`` (their first tensor each).

        Raises:
            ValueError: a name that is no sub-module of the network, or one that did not run.
        """
        modules = self._submodules()
        missing = [name for name in at if name not in modules]
        if missing:
            raise ValueError(f"at={missing}: no such sub-modules of {type(self.network).__name__}")
        with _captured([modules[name] for name in at]) as captured:
            prediction = self(z, t, condition, timestep=timestep)
        silent = [name for i, name in enumerate(at) if i not in captured]
        if silent:
            raise ValueError(f"at={silent} did not run in this call (a compiled network does not run its sub-modules)")
        return prediction, [captured[i] for i in range(len(at))]

    def _submodules(self) -> dict[str, nn.Module]:
        """The modules that :meth:`features` can name."""
        return dict(self.network.named_modules()) if isinstance(self.network, nn.Module) else {}


class FlowMap(Denoiser):
    """A two-time denoiser: ``X(x, t, s) = x + (s - t) u(x, t, s)`` jumps from ``t`` to ``s <= t`` in one call.

    As a plain denoiser it is its own diagonal, ``u(x, t, t) = v(x, t)``.
    """

    @property
    def scalars(self) -> Mapping[str, float]:
        """Numbers that the network embeds, by the name under which a condition brings them ``(B,)``: their defaults."""
        return {}

    def add_scalars(self, scalars: Mapping[str, float]) -> None:
        """Embed further numbers (``guidance_scale``, ``t_low`` ...), given with their defaults.

        What is added is 0 before training: the network's output is what it was, bit for bit. A name that is there keeps
        its weights and gets the new default.

        Raises:
            TypeError: a network that cannot embed any.
        """
        raise TypeError(f"{type(self).__name__} cannot embed {list(scalars)}")

    def embedders(self) -> list[nn.Module]:
        """What the second time and the scalars go through: trained even where all else is frozen under a LoRA."""
        return []

    @abstractmethod
    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """``u(x, t, s)``, shape of ``x``; ``t``, ``s`` ``(B,)``. A plain tensor, safe under ``torch.func.jvp``."""

    def forward(self, z, t, timestep, condition):
        return self.average_velocity(z, t, t, condition)

    def jump(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """``X(x, t, s)``; counts one call. The identity at ``s = t``."""
        self.calls += 1
        t = torch.as_tensor(t, device=x.device).expand(len(x)).contiguous()
        s = torch.as_tensor(s, device=x.device).expand(len(x)).contiguous()
        u = self.average_velocity(x, t, s, condition)
        gap = (s - t).to(torch.promote_types(x.dtype, torch.float32))
        return x + expand(gap, x) * u


@contextmanager
def _captured(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    outputs: dict[int, Tensor] = {}

    def keep(i):
        def hook(_module, _inputs, output):
            outputs[i] = output[0] if isinstance(output, (tuple, list)) else output

        return hook

    handles = [m.register_forward_hook(keep(i)) for i, m in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
