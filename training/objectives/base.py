"""What a training method is: roles, phases and losses. One file in this folder makes one method."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from genkit.denoisers.base import Condition, Denoiser
from genkit.guidance.base import Guider
from genkit.rewards.base import Prompts
from genkit.rng import ItemRNG, hash_seed
from genkit.schedulers.flow_map import FlowMapScheduler


class ObjectiveConfig(BaseModel):
    """Settings of a method; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Role:
    """A network's part in a method.

    Args:
        module: the network.
        trains: whether some phase updates it.
        kept: of one that no phase updates: whether the method changes it itself (an average that serves as reference),
            so that checkpoints hold it. What is neither trained nor kept stays as it was made.
        ema: whether averages of its weights are kept.
        optimizer: settings that replace the run's optimiser settings for this role.
    """

    module: nn.Module
    trains: bool = True
    kept: bool = False
    ema: bool = False
    optimizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A stretch of a training step: ``repeats`` optimiser updates of the roles in ``trains``.

    ``backwards`` is how many losses the method yields for one micro-batch; it must be known beforehand, since all but
    the last are back-propagated without synchronising gradients across processes.
    """

    name: str
    trains: tuple[str, ...]
    repeats: int = 1
    backwards: int = 1


class Loss(NamedTuple):
    """A scalar to back-propagate, the mean over the micro-batch, and what to log beside it (scalars)."""

    value: Tensor
    logs: dict[str, Tensor]


@dataclass
class Batch:
    """One micro-batch: clean samples ``(B, ...)``, what they are conditioned on, and their positions in the run.

    ``fields`` are the tensors of the source by its names for them, ``x0`` among them as it was before any encoding.
    ``prompts`` are the texts, or the class labels, that the condition was made of. ``step`` of ``total_steps`` is under
    way. A source without samples gives zeros as ``x0``.
    """

    x0: Tensor
    condition: Condition
    index: Tensor
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: Prompts | None = None
    step: int = 0
    total_steps: int = 1

    @property
    def progress(self) -> float:
        """How much of the run is behind, in [0, 1): what schedules over training are functions of."""
        return self.step / self.total_steps


class DivergedError(RuntimeError):
    """Raised by a method that sees its own training go wrong; the run stops and keeps its last good checkpoint."""


class Objective(nn.Module, ABC):
    """A training method.

    A subclass names its settings in ``Config``, says what it needs in the class variables, and yields its losses.
    ``student_type`` is what it trains, a denoiser or a :class:`genkit.students.Student`.
    ``needs_samples`` is false where prompts or labels suffice, ``full_precision`` true where ``mixed_precision`` would
    drown what is learned from.
    ``needs_condition`` is false where the method brings its own condition and the data need not, ``shards`` where its
    networks cannot lie in shards on several processes (FSDP). ``adapter`` is what trains where a recipe does not say:
    all weights (``full``), a ``lora`` or a ``sara``.
    All random draws come from ``rng``, whose row ``j`` belongs to item ``j`` of the micro-batch, so that a loss does
    not depend on how a global batch was cut into micro-batches or spread over processes.

    Args:
        config: an instance of ``Config``.
        student: the network to train; a :class:`~genkit.denoisers.base.FlowMap` where ``needs_flow_map``.
        teacher: a frozen network, where the run has one.
    """

    Config: ClassVar[type[BaseModel]] = ObjectiveConfig
    student_type: ClassVar[type] = Denoiser
    needs_samples: ClassVar[bool] = True
    needs_condition: ClassVar[bool] = True
    full_precision: ClassVar[bool] = False
    shards: ClassVar[bool] = True
    adapter: ClassVar[Literal["full", "lora", "sara"]] = "full"
    needs_flow_map: ClassVar[bool] = False
    needs_teacher: ClassVar[Literal["never", "optional", "required"]] = "never"

    def __init__(self, config: Any, student: Denoiser, teacher: Denoiser | None = None):
        super().__init__()
        self.config = config
        self.student = student
        self.teacher = teacher
        # Registered so that a wrapper (DDP) that contains the objective sees the trained weights.
        self.student_module = student.module
        if teacher is not None:
            self.teacher_module = teacher.module.requires_grad_(False).eval()

    @classmethod
    def make(cls, config: Any, student: Denoiser, teacher: Denoiser | None, pipe: Any) -> "Objective":
        """An objective for the student in ``pipe``; for methods that need more of the pipeline, such as its VAE."""
        return cls(config, student, teacher)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Told of the shape of samples in the network's space before any work; raises if they cannot be."""
        return

    def scheduler(self, scheduler: Any) -> Any:
        """What the student is sampled and exported with, given its pipeline's scheduler.

        Jumps on its path where the student learns to jump, else the same.
        """
        return FlowMapScheduler.from_scheduler(scheduler) if self.needs_flow_map else copy.deepcopy(scheduler)

    def own_condition(self, asked: Prompts | None, rng: ItemRNG) -> Condition | None:
        """What samples in the course of training are drawn under, one for each row of ``rng``, where that is not what
        the data says. ``asked``: its texts or labels, if it has any."""
        return None

    def guider(self) -> Guider | None:
        """What samples in the course of training are guided by; nothing by default."""
        return None

    def measures(self, pixels: Tensor, prompts: Prompts | None) -> dict[str, float]:
        """What to record of samples in the course of training, ``(B, C, H, W)`` in about [-1, 1]."""
        return {}

    @property
    def done(self) -> str | None:
        """Why training may end before its last step; the same on every process. Asked after every step."""
        return None

    def restored(self, fields: Mapping[str, Tensor]) -> Tensor | None:
        """What the student makes of the data's ``fields``, in its space; ``None`` where it draws samples from noise."""
        return None

    def pipeline(self, pipe: Any) -> Any | None:
        """What the student in ``pipe`` is exported as, where neither ``pipe`` nor a LoRA can say how it is used."""
        return None

    @property
    def roles(self) -> Mapping[str, Role]:
        """The method's networks by name; the default is one trained student with averaged weights."""
        roles = {"student": Role(self.student_module, ema=True)}
        if self.teacher is not None:
            roles["teacher"] = Role(self.teacher_module, trains=False)
        return roles

    @property
    def uses_forward_mode(self) -> bool:
        """Whether losses go through ``torch.func``'s forward mode, which some ways to spread a network forbid."""
        return False

    def phases(self, step: int) -> Sequence[Phase]:
        """What training step ``step`` consists of; the default is one update of the student from one loss."""
        return (Phase("student", trains=("student",)),)

    def updated(self, phase: Phase) -> None:
        """Called after each optimiser update of ``phase``: the place to move what is ``kept`` but not trained."""
        return

    @abstractmethod
    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        """The losses of one micro-batch, ``phase.backwards`` of them; resumed after each has been back-propagated."""

    def forward(self, phase: Phase, batch: Batch | None = None, rng: ItemRNG | None = None) -> Loss:
        """The first loss of ``batch``, or the next one of the batch under way when called with ``phase`` alone.

        The trainer calls the objective, not :meth:`losses`, because gradients are only synchronised for what runs
        inside the ``forward`` of the wrapped module.
        """
        if batch is not None:
            self._running = self.losses(phase, batch, rng)  # type: ignore[arg-type]
        return next(self._running)


def drop_condition(batch: Batch, rng: ItemRNG, probability: float) -> tuple[Condition, Tensor]:
    """The condition with items dropped to the unconditional branch, and the mask ``(B,)`` of those dropped."""
    dropped = rng.uniform() < probability
    if probability == 0 or not batch.condition.values:
        return batch.condition, torch.zeros_like(dropped)
    return batch.condition.drop(dropped), dropped


def shared(batch: Batch, rng: ItemRNG) -> ItemRNG:
    """One row of randomness for the whole batch: that of the training step, the same on every process."""
    return ItemRNG(hash_seed(rng.seed, *b"step"), [batch.step])
