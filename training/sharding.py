"""Weights that lie in shards on several processes (FSDP), and what a method must be to train on them."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.constants import FSDP_SHARDING_STRATEGY
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from genkit.sara import Sara
from genkit.training.objectives.base import Objective

logger = logging.getLogger("genkit.training")


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


def plugin() -> FullyShardedDataParallelPlugin:
    """FSDP as accelerate's configuration asks for it; a file of version 1 means the same in version 2.

    Raises:
        ValueError: what version 2 has not, or what would leave weights outside the shards.
    """
    for setting, remedy in _REFUSED.items():
        if os.environ.get(f"FSDP_{setting}", "false").lower() not in ("false", "none", ""):
            value = os.environ[f"FSDP_{setting}"]
            raise ValueError(f"fsdp_config: fsdp_{setting.lower()}={value}: {remedy}")
    settings: dict[str, Any] = {}
    if os.environ.get("FSDP_VERSION", "1") == "1":
        strategy = _strategy()
        settings["reshard_after_forward"] = strategy == "FULL_SHARD"
        if os.environ.get("RANK", "0") == "0":
            logger.warning(
                "fsdp_version=1 runs as fsdp_version=2, fsdp_reshard_after_forward=%s", strategy == "FULL_SHARD"
            )
    # Every process makes the network's weights itself, so none has to be sent them.
    return FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **settings)


# Settings that must be off, and what to do instead.
_REFUSED = {
    "ACTIVATION_CHECKPOINTING": "set gradient_checkpointing=true in the recipe, which renames no weights",
    "OFFLOAD_PARAMS": "accepted is false; DeepSpeed (ZeRO 2) can keep the optimiser's state on the CPU",
    "IGNORED_MODULES": "accepted is none: their gradients would differ between processes",
}


def _strategy() -> str:
    """What a file of version 1 calls its sharding strategy, in any of the places and forms it may have."""
    named = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "").upper()
    if named not in FSDP_SHARDING_STRATEGY:
        named = os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    if named.isdigit():
        named = FSDP_SHARDING_STRATEGY[int(named) - 1]
    if named not in ("FULL_SHARD", "SHARD_GRAD_OP"):
        raise ValueError(f"fsdp_sharding_strategy={named}: accepted are FULL_SHARD and SHARD_GRAD_OP")
    return named


def prepare(accelerator: Accelerator, objective: Objective) -> Any:
    """``objective`` ready to train: under FSDP its weights lie in shards from here on."""
    if accelerator.distributed_type != DistributedType.FSDP:
        # DDP would send a SaRA's places and base, which never differ, with every call.
        constant = {id(b) for m in objective.modules() if isinstance(m, Sara) for b in m.buffers()}
        names = [name for name, buffer in objective.named_buffers() if id(buffer) in constant]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, names)
        return accelerator.prepare(objective)
    # accelerate wants an optimiser too, to exchange its weights; ours are made afterwards, over the shards.
    trained = [p for p in objective.parameters() if p.requires_grad]
    return accelerator.prepare(objective, torch.optim.SGD(trained, lr=0.0))[0]


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Where to compute in ``precision`` on weights that stay in float32, as accelerate lets DDP do.

    FSDP and DeepSpeed would cast the weights instead, and with them what a network computes from times.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def check(objective: Objective, **every: int | None) -> None:
    """Refuse, with the remedy, what needs whole weights.

    Args:
        every: after how many steps samples are drawn, by the section that says so.

    Raises:
        ValueError: forward-mode derivatives; samples in the course of training; a method that says so.
    """
    if not objective.shards:
        raise ValueError(
            f"FSDP: objective={type(objective).__name__} calls its networks in ways that shards do not allow; train it "
            "with DDP (`accelerate launch --multi_gpu`), as a LoRA where memory is short"
        )
    if objective.uses_forward_mode:
        raise ValueError(
            f"FSDP: objective={type(objective).__name__} differentiates by torch.func, which cannot look into sharded "
            "weights; set objective.jvp=finite_difference or use a loss without derivatives (psd_m, psd_u)"
        )
    for section, steps in every.items():
        if steps is not None:
            raise ValueError(f"{section}.every={steps}: not with FSDP; set {section}.every=null and sample afterwards")


def is_sharded(parameters: list[Tensor]) -> bool:
    """Whether any of them lies in shards."""
    return any(isinstance(p, DTensor) for p in parameters)


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Put ``value``, whole, into ``target``, which may lie in shards."""
    target.copy_(like(value, target))
