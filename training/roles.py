"""What the trainer keeps for each trained network: its optimiser, its schedule, its averages."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genkit.sara import sara_layers
from genkit.training.config import TrainConfig
from genkit.training.ema import EMA
from genkit.training.objectives.base import Objective, Phase, Role
from genkit.training.optimizers import lr_factor, make_optimizer
from genkit.training.sections import Named, Sara
from genkit.training.sharding import is_sharded, optimizer_state, whole
from genkit.training.sparse import SparseTraining
from genkit.training.zero import Zero


class TrainedRole:
    """A trained network with its optimiser, learning-rate schedule and averages.

    Raises:
        ValueError: nothing in it is trainable.
    """

    def __init__(self, name: str, role: Role, config: TrainConfig):
        self.name, self.module = name, role.module
        self.parameters = {n: p for n, p in role.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(f"role {name!r} of objective={config.objective.name!r} has no trainable weights")
        optimizer = {"name": config.optimizer.name, **config.optimizer.settings, **role.optimizer}
        self.optimizer = make_optimizer(Named(**optimizer), list(self.parameters.values()))
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._factor = lr_factor(
            config.lr_scheduler,
            config.lr_warmup_steps,
            config.max_train_steps,
            config.lr_final_ratio,
            config.lr_hold_ratio,
        )
        averaged = self.parameters | averaged_buffers(role.module)
        self.ema = EMA(averaged, config.ema.decays) if role.ema and config.ema.decays else None
        self.sparse: SparseTraining | None = None
        if isinstance(config.adapter, Sara) and any(s.delta.requires_grad for s in sara_layers(role.module).values()):
            self.sparse = SparseTraining(role.module, config.adapter, config, self.optimizer)
        self.zero: Zero | None = None  # under DeepSpeed, what has taken over the optimiser

    def enable(self, on: bool) -> None:
        """Whether losses reach its weights; gradients with respect to its inputs pass in any case."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(on)

    def begin(self, step: int) -> float:
        """Put the optimiser, and a SaRA, at ``step`` of their schedules; returns the rate (of the first group)."""
        if self.sparse is not None:
            self.sparse.begin(step)
        factor = self._factor(step)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self._rates[0] * factor

    def gradient_norm(self, limit: float | None) -> Tensor:
        """The norm of the gradient, before it is cut to ``limit``."""
        present = [p for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in present if p.grad is not None])
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(present, limit, norm)
        return whole(norm)

    def update(self, limit: float | None, scaler: torch.amp.GradScaler | None) -> Tensor:
        """One step of the optimiser and of the averages; returns the norm of the gradient, before it is cut."""
        if self.zero is not None:
            norm = self.zero.step()
        else:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            if self.sparse is not None:
                self.sparse.add_gradient()
            norm = self.gradient_norm(limit)
            self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        return norm

    @property
    def spread(self) -> bool:
        """Whether what a checkpoint holds of it must be gathered by all processes together."""
        return self.zero is not None or is_sharded(list(self.parameters.values()))

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state, whole, as one process has it; where it is spread, every process must call."""
        return whole(self.optimizer.state_dict()) if self.zero is None else self.zero.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`optimizer_state` gave, after the weights."""
        if self.zero is None:
            self.optimizer.load_state_dict(optimizer_state(state, list(self.parameters.values())))
        else:
            self.zero.load_state_dict(state)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Live tensors of a checkpoint by file and name.

        The trained weights, a fully trained network's buffers and those that ``trained_buffers`` of sub-modules name,
        and the averages.
        """
        weights: dict[str, Tensor] = {n: p.detach() for n, p in self.parameters.items()}
        weights |= named_buffers(self.module, "trained_buffers")
        if len(weights) == len(list(self.module.parameters())):
            weights |= persistent_buffers(self.module)
        files = {self.name: weights}
        if self.ema is not None:
            files[f"{self.name}.ema"] = self.ema.state_dict()
        return files


def trained_roles(objective: Objective, config: TrainConfig, phases: Sequence[Phase]) -> dict[str, TrainedRole]:
    """The trained roles; frozen ones are put in eval mode and lose their gradients.

    Raises:
        ValueError: trainable weights that no role, or more than one, would train; a phase that trains an unknown role.
    """
    roles = objective.roles
    for name, role in roles.items():
        if role.trains and role.kept:
            raise ValueError(f"role {name!r}: kept=True with trains=True; what is trained is kept anyway")
        role.module.train(role.trains)
        if not role.trains:
            role.module.requires_grad_(False)
    owners: dict[int, list[str]] = {}
    for name, role in roles.items():
        for parameter in role.module.parameters():
            owners.setdefault(id(parameter), []).append(name)
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and len(owners.get(id(parameter), [])) != 1:
            raise ValueError(
                f"objective={config.objective.name!r}: the trainable weight {name!r} must belong to one role, it "
                f"belongs to {owners.get(id(parameter), [])} of {list(roles)}"
            )
    trained = {name: TrainedRole(name, role, config) for name, role in roles.items() if role.trains}
    for phase in phases:
        wrong = [name for name in phase.trains if name not in trained]
        if wrong:
            raise ValueError(
                f"objective={config.objective.name!r}: phase {phase.name!r} trains {wrong}; trained roles are "
                f"{list(trained)}"
            )
    return trained


def own_buffers(objective: Objective) -> dict[str, Tensor]:
    """Persistent buffers of the objective itself, outside every role: its counters and running statistics."""
    of_roles = {id(b) for role in objective.roles.values() for b in role.module.buffers()}
    return {n: b for n, b in persistent_buffers(objective).items() if id(b) not in of_roles}


def state(module: nn.Module) -> dict[str, Tensor]:
    """Every weight of ``module`` by name, and the buffers that its state holds; live tensors."""
    return {n: p.detach() for n, p in module.named_parameters()} | persistent_buffers(module)


def averaged_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that ``averaged_buffers`` of sub-modules name.

    They are learned without a gradient, and belong with averaged weights as averages: the codes of a moving-average
    codebook stand for what an encoder puts out, and an averaged encoder for what it put out on the average.
    """
    return named_buffers(module, "averaged_buffers")


def named_buffers(module: nn.Module, attribute: str) -> dict[str, Tensor]:
    """The buffers whose names sub-modules have in ``attribute``."""
    names = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        for name in getattr(part, attribute, ())
    ]
    return {name: module.get_buffer(name) for name in names}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of ``module`` that its state holds."""
    saved: Mapping[str, Tensor] = module.state_dict(keep_vars=True)
    return {n: b for n, b in module.named_buffers() if n in saved}
