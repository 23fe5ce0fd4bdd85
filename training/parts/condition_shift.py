"""The other branch of a network: its velocity under a shifted condition, or at a negated time.

A network asked under a condition that no sample has can be taught to follow another law (that of its own samples)
beside the one it was made for: a "fake score" without a second network. Where the shift cannot be seen by the network
the two branches are one and nothing is learned, so both kinds say which items they changed.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from diffusers.models.embeddings import LabelEmbedding
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from genkit._files import read_tensors
from genkit.denoisers import TwoTime
from genkit.denoisers.base import Condition, FlowMap
from genkit.denoisers.network import NetworkDenoiser
from genkit.training.adapters import base_network
from genkit.training.parts.losses import mean_of_squares

logger = logging.getLogger("genkit.training")

VISIBLE = 1e-3  # of the mean square of the velocity: below it, the branches are one for training


class ConditionShiftConfig(BaseModel):
    """``c -> A c + b`` on every token of the condition.

    ``form``: ``scalar`` is ``A = a I``, ``b = b 1``; ``diag`` has a factor and an offset a feature, ``full`` a matrix.
    ``learned``: train ``A`` and ``b`` with the network, from ``a`` and ``b``. ``weights``: a safetensors file of ``a``
    ``()``, ``(D,)`` or ``(D, D)`` and ``b`` ``()`` or ``(D,)`` to start from instead.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["condition"] = "condition"
    form: Literal["scalar", "diag", "full"] = "scalar"
    a: float = -0.5
    b: float = 0.0
    learned: bool = False
    weights: Path | None = None

    @model_validator(mode="after")
    def _has_effect(self):
        if self.weights is not None and self.model_fields_set & {"a", "b"}:
            raise ValueError(f"weights={str(self.weights)!r} brings a and b; they cannot be set beside it")
        if self.form != "scalar" and not self.learned and self.weights is None:
            raise ValueError(f"form={self.form!r} differs from scalar only with learned=true or weights")
        if self.weights is None and not self.learned and (self.a, self.b) == (1, 0):
            raise ValueError("a=1, b=0 is no shift: the branches would be one")
        return self

    def make(self, student: FlowMap) -> "ConditionShift":
        return ConditionShift(self, student)


class TimeSignConfig(BaseModel):
    """The network at ``-t``: the branch of TwinFlow. Source: arXiv 2512.05150."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["time_sign"] = "time_sign"

    def make(self, student: FlowMap) -> "TimeSign":
        return TimeSign(student)


ShiftConfig: TypeAlias = Annotated[ConditionShiftConfig | TimeSignConfig, Field(discriminator="kind")]


class Branch(nn.Module, ABC):
    """The other branch of a flow map, on the diagonal."""

    @abstractmethod
    def velocity(self, student: FlowMap, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The branch's velocity at ``x`` ``(B, ...)`` and ``t`` ``(B,)``, and which items it differs for, ``(B,)``."""


class TimeSign(Branch):
    """The network is told ``-t``; the path keeps its coefficients at ``t``.

    Raises:
        ValueError: a network of genkit's own two times, or a function, that does not predict velocities.
    """

    def __init__(self, student: FlowMap):
        super().__init__()
        self._by_timestep = isinstance(student, TwoTime)
        if not self._by_timestep and student.prediction_type != "flow_prediction":
            raise ValueError(
                f"shift.kind='time_sign': {type(student).__name__} would convert its "
                f"prediction_type={student.prediction_type!r} with the negated time; accepted is flow_prediction"
            )

    def velocity(self, student, x, t, condition):
        if not self._by_timestep:
            return student.average_velocity(x, -t, -t, condition), t != 0
        timestep = student.interpolant.timestep(t)
        return student.forward(x, t, -timestep, condition), timestep != 0


class ConditionShift(Branch):
    """``A c + b`` where the attention layers take the condition in: tokens after the network's projection of them.

    ======================  ===========================================================================
    SD3, Flux               output of ``context_embedder``
    UNets, plain functions  ``prompt_embeds`` themselves, which every cross-attention projects by itself
    DiT, genkit's DiT       output of the embedders of the class label: the condition has no tokens
    ======================  ===========================================================================

    Pooled embeddings, guidance and times are left alone, and so is the condition itself: nothing is changed in place.
    An offset equal for all tokens adds a constant to attention's logits, which softmax ignores, and normalised keys do
    not see a positive factor: prefer ``a < 0`` to ``b``. With ``a = -1, b = 0`` (as with any ``a``, ``b = 0``) a
    condition of zeros is not changed, which :meth:`velocity` says.

    Raises:
        ValueError: a ``form`` whose width is not known from the network; a file that does not fit; a network that is
            conditioned on nothing that can be shifted.
    """

    def __init__(self, config: ConditionShiftConfig, student: FlowMap):
        super().__init__()
        self._in_blocks = any(isinstance(m, LabelEmbedding) for m in _embedders(student))
        if config.weights is not None:
            a, b = _read(config, _width(student))
        else:
            width = () if config.form == "scalar" else (_known_width(config, student),)
            a, b = torch.full(width, config.a), torch.full(width, config.b)
            a = torch.diag(a) if config.form == "full" else a
        self.a = nn.Parameter(a, requires_grad=config.learned)
        self.b = nn.Parameter(b, requires_grad=config.learned)

    def forward(self, c: Tensor) -> Tensor:
        """``A c + b`` of ``c`` ``(..., D)``."""
        a, b = self.a.to(c.dtype), self.b.to(c.dtype)
        return (c @ a.T if a.ndim == 2 else a * c) + b

    def velocity(self, student, x, t, condition):
        embedders = _embedders(student)
        if not embedders and "prompt_embeds" not in condition.values:
            raise ValueError(
                f"shift.kind='condition': the samples are conditioned on {sorted(condition.values) or 'nothing'}, and "
                "prompt_embeds or the labels of a DiT can be shifted; use shift.kind=time_sign"
            )
        if embedders:
            self._check_checkpointing(student)
            with self._shifting(embedders) as changed:
                value = student.average_velocity(x, t, t, condition)
            return value, torch.stack(changed).any(0)
        tokens = condition["prompt_embeds"]
        shifted = self(tokens)
        other = Condition({**condition.values, "prompt_embeds": shifted})
        return student.average_velocity(x, t, t, other), _differ(shifted, tokens)

    @contextmanager
    def _shifting(self, embedders: list[nn.Module]) -> Iterator[list[Tensor]]:
        changed: list[Tensor] = []

        def hook(_module, _inputs, output: Tensor) -> Tensor:
            shifted = self(output)
            changed.append(_differ(shifted, output))
            return shifted

        handles = [m.register_forward_hook(hook) for m in embedders]
        try:
            yield changed
        finally:
            for handle in handles:
                handle.remove()

    def _check_checkpointing(self, student: FlowMap) -> None:
        on = any(getattr(m, "gradient_checkpointing", False) for m in base_network(student).modules())
        if self._in_blocks and on and torch.is_grad_enabled():
            raise ValueError(
                "gradient_checkpointing=True: backward would recompute the blocks, which embed the label, without the "
                "shift; train with gradient_checkpointing=false or shift.kind=time_sign"
            )


@torch.no_grad()
def visibility(branch: Branch, student: FlowMap, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """``E |v_shifted - v|^2 / E |v|^2``: how much of the velocity the shift moves; 0 where it cannot be seen."""
    plain = student.average_velocity(x, t, t, condition)
    return relative_square(branch.velocity(student, x, t, condition)[0] - plain, plain)


def relative_square(difference: Tensor, velocity: Tensor) -> Tensor:
    """``E |difference|^2 / E |velocity|^2`` over a batch, a scalar."""
    return mean_of_squares(difference).mean() / mean_of_squares(velocity).mean().clamp(min=1e-20)


def warn_if_invisible(value: float) -> None:
    """Warn where the visibility is below :data:`VISIBLE`."""
    if value < VISIBLE:
        logger.warning(
            "the shift moves the velocity by %.2g of its mean square, less than %g: the branches can hardly be told "
            "apart; try a negative shift.a, shift.learned=true or shift.kind=time_sign",
            value,
            VISIBLE,
        )


def _differ(shifted: Tensor, plain: Tensor) -> Tensor:
    return (shifted.detach() != plain.detach()).flatten(1).any(1)


def _embedders(student: FlowMap) -> list[nn.Module]:
    """The modules whose output is the condition as the blocks see it; none where the network takes it as it is."""
    if not isinstance(student, (TwoTime, NetworkDenoiser)):
        return []
    network: Any = base_network(student)
    own = [getattr(network, name, None) for name in ("context_embedder", "class_embed")]
    labels = [m for m in network.modules() if isinstance(m, LabelEmbedding)]
    return [m for m in own if isinstance(m, nn.Module)] + labels


def _width(student: FlowMap) -> int | None:
    """Number of features of what is shifted, where the network tells."""
    for module in _embedders(student):
        table = getattr(module, "embedding_table", module)
        return getattr(table, "embedding_dim", None) or getattr(table, "out_features", None)
    network = base_network(student) if isinstance(student, (TwoTime, NetworkDenoiser)) else None
    return getattr(getattr(network, "config", None), "cross_attention_dim", None)


def _known_width(config: ConditionShiftConfig, student: FlowMap) -> int:
    width = _width(student)
    if not isinstance(width, int):
        raise ValueError(f"shift.form={config.form!r}: the width of the condition is not known; accepted is scalar")
    return width


def _read(config: ConditionShiftConfig, width: int | None) -> tuple[Tensor, Tensor]:
    assert config.weights is not None
    tensors, _ = read_tensors(config.weights)
    if set(tensors) != {"a", "b"}:
        raise ValueError(f"shift.weights={str(config.weights)!r} holds {sorted(tensors)}, wanted a and b")
    a, b = tensors["a"], tensors["b"]
    n = ("scalar", "diag", "full").index(config.form)
    d = a.shape[-1] if n and a.ndim else None
    fits = tuple(a.shape) == (d,) * n and tuple(b.shape) in ((), (d,)) and (d is None or width in (None, d))
    if not fits:
        raise ValueError(
            f"shift.weights={str(config.weights)!r} holds a of shape {tuple(a.shape)} and b of {tuple(b.shape)}; "
            f"form={config.form!r} on {width or 'D'} features takes {((), '(D,)', '(D, D)')[n]}, and b () or (D,)"
        )
    return a.float(), b.float()
