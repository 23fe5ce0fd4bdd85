"""DeepSpeed: ZeRO stages 0 to 2, which leave weights whole and spread gradients and the optimiser's state."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from genkit.registry import unknown
from genkit.training.config import TrainConfig
from genkit.training.objectives.base import DivergedError, Objective

# Stages 1 and 2 lay all weights end to end, so that an optimiser must not look at their shapes, nor hold state before
# its first step.
ELEMENTWISE = ("ASGD", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")

# What of a DeepSpeed configuration has no part in what is computed, beside what the recipe decides.
_SETTINGS = ["zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor"]
_SETTINGS += ["steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger"]
_ZERO = ["stage", "allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter"]
_ZERO += ["reduce_bucket_size", "contiguous_gradients", "offload_optimizer", "offload_param"]


def configure(accelerator: Accelerator, config: TrainConfig) -> list[str]:
    """Put the recipe's settings into DeepSpeed's configuration; returns what they replaced, to be logged.

    Raises:
        ValueError: a setting that would change what is computed, or that does nothing here.
    """
    settings: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    optimizing = settings["zero_optimization"]
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ValueError(
                f"deepspeed_config: {section}={settings[section]}: remove it; the recipe's optimizer and lr_scheduler "
                "are what trains"
            )
    stage = optimizing.get("stage", 0)
    if stage not in (0, 1, 2):
        raise ValueError(
            f"deepspeed_config: zero_optimization.stage={stage}: accepted are 0, 1 and 2, which leave weights whole; "
            "FSDP (distributed_type=FSDP) shards them"
        )
    for place, accepted in (
        ("offload_param", ("none",)),
        ("offload_optimizer", ("none", "cpu") if stage else ("none",)),
    ):
        device = (optimizing.get(place) or {}).get("device") or "none"
        if device not in accepted:
            raise ValueError(
                f"deepspeed_config: zero_optimization.{place}.device={device}: accepted with stage {stage} are "
                f"{', '.join(accepted)}"
            )
    name = config.optimizer.name
    if stage and name not in ELEMENTWISE:
        raise ValueError(
            f"optimizer.name={name!r}: DeepSpeed lays the weights of stages 1 and 2 end to end, for which accepted "
            f"are {', '.join(ELEMENTWISE)}"
        )
    accumulation = config.gradient_accumulation_steps
    clipping = config.max_grad_norm or 0.0
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.global_batch_size // (accelerator.num_processes * accumulation),
        "train_batch_size": config.global_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clipping,
        # accelerate would exchange an offloaded optimiser for DeepSpeed's Adam.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    replaced = [
        f"{key}={settings[key]} (recipe: {value})"
        for key, value in ours.items()
        if settings.get(key, "auto") not in ("auto", value)
    ]
    for half in ("fp16", "bf16"):  # see sharding.autocast
        if settings.get(half, {}).get("enabled") is True:
            replaced.append(f"{half}.enabled=True (recipe: autocast to {config.mixed_precision}, weights in float32)")
        ours[half] = {"enabled": False}
    _known("", settings, [*ours, *_SETTINGS])
    # Templates carry stage 3's settings along, and accelerate writes one of them itself.
    _known(".zero_optimization", [key for key in optimizing if not key.startswith("stage3_")], _ZERO)
    settings |= ours
    # Stage 0 leaves whole gradients, whose norm it would not tell.
    settings["gradient_clipping"] = clipping if stage else 0.0
    for part in (settings, optimizing):  # what is still "auto" is DeepSpeed's own default
        for key in [k for k, v in part.items() if v == "auto"]:
            del part[key]
    return replaced


def _known(section: str, keys: Iterable[str], accepted: list[str]) -> None:
    for key in keys:
        if key not in accepted:
            raise ValueError(unknown(f"deepspeed_config{section}: key", key, accepted))


class Zero:
    """The engine that holds a network and its optimiser: it sums gradients, clips them and steps.

    Args:
        objective: on its device, with its trained weights alone in ``optimizer``.
        optimizer: keeps its settings, but from here on holds this process's part of the weights, as one vector.
        limit: to which the norm of the gradient is cut.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, optimizer: Optimizer, limit: float | None):
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.optimizer, self.limit, self.main = optimizer, limit, accelerator.is_main_process
        self.engine, _ = accelerator.prepare(objective, optimizer)
        self.partitioned = self.engine.zero_optimization_stage() > 0

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, which are summed over processes where the boundary was set before."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        """One update; returns the norm of the gradient, before it was cut.

        Raises:
            DivergedError: that norm is not finite, so DeepSpeed left the weights as they were.
        """
        if not self.partitioned:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.limit or float("inf"))
            self.engine.step()
            return norm
        self.engine.step()
        if not self.engine.was_step_applied():
            raise DivergedError("the gradient is not finite")
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.parameters[0].device)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state as one process without DeepSpeed has it; only the main process gets it whole.

        Every process must call.
        """
        if not self.partitioned:
            return self.optimizer.state_dict()
        from deepspeed.utils import safe_get_full_optimizer_state

        flat, mine = self._flat()
        state: dict[int, dict[str, Any]] = {i: {} for i in range(len(self.parameters))}
        for key, value in mine.items():
            spread = isinstance(value, Tensor) and value.shape == flat.shape
            for i, parameter in enumerate(self.parameters):
                own = safe_get_full_optimizer_state(parameter, key) if spread else deepcopy(value)
                if self.main:  # one weight's at a time, since the state may be too large for a process
                    state[i][key] = own.cpu() if spread else own
        (group,) = self.optimizer.state_dict()["param_groups"]
        state = {i: values for i, values in state.items() if values}
        return {"state": state, "param_groups": [{**group, "params": list(range(len(self.parameters)))}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`, and the weights as they are now."""
        if not self.partitioned:
            self.optimizer.load_state_dict(state)
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

        self.engine.optimizer.refresh_fp32_params()
        flat, _ = self._flat()
        by_weight: dict[int, dict[str, Any]] = state["state"]  # none of a weight that has had no gradient yet
        first = next(iter(by_weight.values()), {})
        spread = [
            key
            for key, value in first.items()
            if isinstance(value, Tensor) and all(v[key].shape == self.parameters[i].shape for i, v in by_weight.items())
        ]
        mine = {key: torch.zeros_like(flat) if key in spread else value for key, value in first.items()}
        (group,) = state["param_groups"]
        if len(group["params"]) != len(self.parameters):
            raise ValueError(f"it is of {len(group['params'])} weights, wanted {len(self.parameters)}")
        flat_state = {"state": {0: mine} if mine else {}, "param_groups": [{**group, "params": [0]}]}
        self.optimizer.load_state_dict(flat_state)
        lazy_init_hp_params_optimizer_state(self.parameters, flat, self.optimizer.state)
        for i, values in by_weight.items():
            for key in spread:
                safe_set_full_optimizer_state(self.parameters[i], values[key], key)

    def _flat(self) -> tuple[Tensor, dict[str, Any]]:
        """This process's part of the weights, and the optimiser's state of it."""
        ((flat,),) = [group["params"] for group in self.optimizer.param_groups]
        return flat, self.optimizer.state.get(flat, {})
