"""The machine of a run: what accelerate's configuration asks for, held against the recipe, which decides."""

import logging
import os

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    parse_flag_from_env,
)

from genkit.training import sharding, zero
from genkit.training.config import TrainConfig
from genkit.training.objectives.base import Objective, Phase

logger = logging.getLogger("genkit.training")

# One process, and DDP on any kind of device.
_WHOLE = [kind for kind in DistributedType if kind.name == "NO" or kind.name.startswith("MULTI_")]
ACCEPTED = [*_WHOLE, DistributedType.FSDP, DistributedType.DEEPSPEED]


def accelerator(config: TrainConfig, *, find_unused: bool) -> Accelerator:
    """The Accelerator of a run, in the environment that ``accelerate launch`` made, or without one.

    Where accelerate's configuration contradicts the recipe, the recipe holds, and one line of the log says so.

    Args:
        find_unused: whether DDP has to look for weights without gradient.

    Raises:
        ValueError: accelerate's configuration asks for what cannot be done; before any network is touched.
    """
    _refuse()
    deepspeed, fsdp = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"), parse_flag_from_env("ACCELERATE_USE_FSDP")
    if (deepspeed or fsdp) and config.mixed_precision == "fp16":
        raise ValueError("mixed_precision='fp16': its loss scaling is not supported with FSDP and DeepSpeed; use bf16")
    cpu = not torch.accelerator.is_available()
    handlers = [
        DistributedDataParallelKwargs(find_unused_parameters=find_unused),
        # Releases of PyTorch keep a weight that was first cast under no_grad, without its gradient.
        AutocastKwargs(cache_enabled=False),
    ]
    if deepspeed and cpu:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    made = Accelerator(
        # Else several processes without a GPU would not find each other; DeepSpeed finds them itself, and is left out
        # by accelerate on a machine that is said to be a CPU.
        cpu=cpu and not deepspeed,
        # Both would train weights of lower precision: see sharding.autocast.
        mixed_precision="no" if deepspeed or fsdp else config.mixed_precision,
        log_with=config.report_to or None,
        project_config=ProjectConfiguration(str(config.output_dir), str(config.output_dir / config.logging_dir)),
        fsdp_plugin=sharding.plugin() if fsdp else None,
        dynamo_plugin=TorchDynamoPlugin(dynamic=False),
        # The trainer divides losses itself, and accelerate would do so again for a setting of its environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps if deepspeed else 1
        ),
        kwargs_handlers=handlers,
    )
    kind = made.distributed_type
    if kind not in ACCEPTED:
        raise ValueError(f"distributed_type={kind.value}: accepted are {', '.join(m.value for m in ACCEPTED)}")
    if fsdp and kind != DistributedType.FSDP:
        raise ValueError(
            f"distributed_type=FSDP: accelerate shards weights on GPUs only and would run this as {kind.value}; set "
            f"distributed_type={kind.value}"
        )
    _check_batch(made.num_processes, config)
    theirs = []
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", config.mixed_precision)
    if precision != config.mixed_precision:
        theirs.append(f"mixed_precision={precision} (recipe: {config.mixed_precision})")
    if kind == DistributedType.DEEPSPEED:
        theirs += zero.configure(made, config)
    if theirs and made.is_main_process:
        logger.warning("accelerate's configuration is overridden by the recipe: %s", ", ".join(theirs))
    return made


def check(made: Accelerator, config: TrainConfig, objective: Objective, phases: list[Phase]) -> None:
    """Refuse a method that cannot train on this machine.

    Raises:
        ValueError: it trains several networks, by several losses, or a SaRA, on FSDP or DeepSpeed; FSDP's own limits.
    """
    if made.distributed_type in _WHOLE:
        return
    name, kind = type(objective).__name__, made.distributed_type.value
    trained = {role for phase in phases for role in phase.trains}
    if len(trained) > 1 or any(phase.backwards > 1 for phase in phases):
        raise ValueError(
            f"{kind}: objective={name} trains {sorted(trained)} in turns or by several losses, which it cannot; train "
            "it with DDP (`accelerate launch --multi_gpu`)"
        )
    moved = [role for role, part in objective.roles.items() if part.kept]
    if moved:
        raise ValueError(
            f"{kind}: objective={name} changes the weights of {moved} beside the optimiser, which it cannot; train it "
            "with DDP (`accelerate launch --multi_gpu`)"
        )
    if config.adapter.kind == "sara":
        raise ValueError(
            f"{kind}: adapter.kind=sara writes single entries of whole weights, which it lays "
            "out anew; train it with DDP (`accelerate launch --multi_gpu`)"
        )
    if made.distributed_type == DistributedType.FSDP:
        sharding.check(objective, sampling=config.sampling.every, evaluation=config.evaluation.every)


def _refuse() -> None:
    """What can be seen to be impossible before accelerate starts anything."""
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "distributed_type=MEGATRON_LM: accelerate trains nothing but some language models of transformers that "
            f"way; accepted are {', '.join(m.value for m in ACCEPTED)}"
        )
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = {k: int(os.environ.get(f"PARALLELISM_CONFIG_{k.upper()}", 1)) for k in _SIZES}
        spread = {k: v for k, v in sizes.items() if v > 1}
        if spread:
            raise ValueError(
                f"parallelism_config: {spread}; accepted is dp_shard_size alone (FSDP over all processes): networks "
                "are not cut by layers, sequences or groups of machines"
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        for setting in ("USE_FULLGRAPH", "USE_REGIONAL_COMPILATION", "USE_DYNAMIC"):
            if parse_flag_from_env(f"ACCELERATE_DYNAMO_{setting}"):
                raise ValueError(
                    f"dynamo_config: dynamo_{setting.lower()}=True: accepted is False; what is compiled is a method "
                    "with its losses, which is neither one graph nor repeated blocks, and seeds are no sizes"
                )
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError("dynamo_config: accepted with distributed_type=DEEPSPEED is dynamo_backend=no")


_SIZES = ("dp_replicate_size", "tp_size", "cp_size", "sp_size")


def _check_batch(processes: int, config: TrainConfig) -> None:
    accumulation = config.gradient_accumulation_steps
    if config.global_batch_size % (processes * accumulation):
        raise ValueError(
            f"global_batch_size={config.global_batch_size} is not a multiple of processes * "
            f"gradient_accumulation_steps = {processes} * {accumulation}"
        )
