"""Weights that lie in shards on several processes (FSDP), and what a method must be to train on them."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from genkit.training.objectives.base import Objective, Phase


def whole(value: Any) -> Any:
    """Tensors of a nest of dicts and lists put together from their shards; every process must call."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(v) for v in value)
    return value


def like(value: Tensor, reference: Tensor) -> Tensor:
    """``value``, which is whole on every process, cut as ``reference`` is."""
    if not isinstance(reference, DTensor) or value.shape != reference.shape:
        return value
    value = value.to(reference.device)
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)


def optimizer_state(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """A whole state of an optimiser over ``parameters``, cut as they are."""
    cut = {
        i: {k: like(v, parameters[int(i)]) if isinstance(v, Tensor) else v for k, v in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": cut}


def check(accelerator: Accelerator, objective: Objective, phases: list[Phase], sampling_every: int | None) -> None:
    """Refuse, with the remedy, what does not go with sharded weights.

    Raises:
        ValueError: FSDP of version 1; a method of several phases, roles or backwards, or with forward-mode
            derivatives; samples in the course of training.
    """
    plugin = accelerator.state.fsdp_plugin
    name = type(objective).__name__
    if plugin is None or plugin.fsdp_version != 2:
        raise ValueError("FSDP: accepted is fsdp_version=2, whose weights keep their shapes; set it for accelerate")
    trained = {role for phase in phases for role in phase.trains}
    if len(trained) > 1 or any(phase.backwards > 1 for phase in phases):
        raise ValueError(
            f"FSDP: objective={name} trains {sorted(trained)} in turns or by several losses, which needs whole "
            "weights; train it with DDP (`accelerate launch --multi_gpu`)"
        )
    if objective.uses_forward_mode:
        raise ValueError(
            f"FSDP: objective={name} differentiates by torch.func, which cannot look into sharded weights; set "
            "objective.jvp=finite_difference or use a loss without derivatives (psd_m, psd_u)"
        )
    if sampling_every is not None:
        raise ValueError(
            f"sampling.every={sampling_every}: not with FSDP; set sampling.every=null and sample afterwards"
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision='fp16': its loss scaling is not supported with FSDP; use bf16 or no")


def is_sharded(parameters: list[Tensor]) -> bool:
    """Whether any of them lies in shards."""
    return any(isinstance(p, DTensor) for p in parameters)


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Put ``value``, whole, into ``target``, which may lie in shards."""
    target.copy_(like(value, target))
