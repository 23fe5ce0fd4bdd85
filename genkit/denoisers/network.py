"""Adapters for the networks of Diffusers: a file a network class, found by walking this folder."""

import inspect
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genkit.denoisers.base import Condition, Denoiser
from genkit.interpolants import PREDICTION_TYPES, Interpolant, from_scheduler, scheduler_prediction_type
from genkit.registry import members

_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NetworkDenoiser(Denoiser):
    """A Diffusers network as a denoiser; a subclass is the adapter of one class of networks.

    Attributes:
        network_classes: names of the classes that the adapter is for; their subclasses are taken too.
        prediction_types: what such networks can have been trained to predict.
        condition_names: the values that a :class:`Condition` must bring.
        arguments: the network's own names of those that it calls otherwise.
        inner: the network without the wrappers of torch.compile, accelerate and PEFT.
    """

    prediction_types: tuple[str, ...] = PREDICTION_TYPES
    condition_names: tuple[str, ...] = ()
    arguments: Mapping[str, str] = {}

    def __init__(self, network: nn.Module, interpolant: Interpolant, prediction_type: str):
        super().__init__(network, interpolant, prediction_type)
        self.inner: Any = unwrap(network)
        if prediction_type not in self.prediction_types:
            raise ValueError(
                f"prediction_type={prediction_type!r} on {type(interpolant).__name__} does not fit "
                f"{type(self.inner).__name__}, which predicts {' or '.join(self.prediction_types)}; "
                "use a flow-matching scheduler such as FlowMatchEulerDiscreteScheduler"
            )

    @abstractmethod
    def encode(self, *args: Any, **inputs: Any) -> Condition:
        """``encode(pipe, ...)``: what ``pipe`` would make of these inputs, and its unconditional branch."""

    def _around(self, network):
        return wrap(network, self.interpolant, self.prediction_type)

    def time_modules(self) -> list[str]:
        """Names of the sub-modules whose output embeds the time; a two-time adapter adds the gap's embedding to it.

        Raises:
            ValueError: the network embeds no time in a way that is known.
        """
        raise ValueError(f"{type(self).__name__} names no time embedding, so it cannot be given a second time")

    def _submodules(self) -> dict[str, nn.Module]:
        return dict(self.inner.named_modules())

    def _inputs(self, z: Tensor, condition: Condition) -> tuple[Tensor, Condition]:
        """``z`` and the condition in the network's dtype, after a check that every value is there."""
        missing = [name for name in self.condition_names if name not in condition.values]
        if missing:
            raise ValueError(
                f"condition lacks {missing}, got {sorted(condition.values)}; "
                f"{type(self.inner).__name__} needs {list(self.condition_names)}, see {type(self).__name__}.encode"
            )
        # The first weight's, float8 storage aside: asking Diffusers' ``dtype`` walks the whole network.
        dtype = next((p.dtype for p in self.inner.parameters() if p.dtype in _COMPUTE_DTYPES), z.dtype)
        fits = all(v.dtype == dtype for v in condition.values.values() if v.is_floating_point())
        return z.to(dtype), condition if fits else condition.to(dtype)


def texts(prompt: str | Sequence[str], n: int = 1) -> list[str]:
    """A list of prompts; one prompt stands for ``n`` equal ones."""
    return [prompt] * n if isinstance(prompt, str) else list(prompt)


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch.compile, accelerate (DDP, DataParallel ...) and PEFT."""
    from accelerate.utils import extract_model_from_parallel

    while True:
        inner = extract_model_from_parallel(network, keep_torch_compile=False)
        peft = sys.modules.get("peft")
        if peft is not None and isinstance(inner, peft.PeftModel):
            inner = inner.get_base_model()
        if inner is network:
            return network
        network = inner


def _adapters() -> dict[str, type[Denoiser]]:
    """Adapters by the network class they are for: those of this folder, and any that a user has defined."""
    members("genkit.denoisers", NetworkDenoiser)  # imports every file
    found: dict[str, type[Denoiser]] = {}
    pending: list[type[Denoiser]] = [Denoiser]
    while pending:
        adapter = pending.pop()
        found |= dict.fromkeys(adapter.network_classes, adapter)
        pending += adapter.__subclasses__()
    return found


def adapter_of(network) -> type[Denoiser] | None:
    """The adapter for ``network``, by its class; ``None`` if there is none."""
    known = _adapters()
    return next((known[c.__name__] for c in type(unwrap(network)).__mro__ if c.__name__ in known), None)


def wrap(network: nn.Module, interpolant: Interpolant, prediction_type: str) -> Denoiser:
    """The denoiser of ``network``, by its class (under PEFT, torch.compile and accelerate's wrappers).

    Raises:
        ValueError: no adapter for this class, or a prediction type that such networks do not have.
    """
    adapter = adapter_of(network)
    if adapter is None:
        raise ValueError(
            f"network={type(unwrap(network)).__name__} has no adapter; there are adapters for "
            f"{', '.join(sorted(_adapters()))}; any callable can be a FunctionDenoiser"
        )
    return adapter(network, interpolant, prediction_type)


def from_pipeline(pipe) -> Denoiser:
    """The denoiser of a Diffusers pipeline: its network on the interpolant of its scheduler.

    Raises:
        ValueError: a network without adapter, a scheduler without interpolant, or the two do not fit.
    """
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module) and adapter_of(part)]
    if len(networks) != 1:
        names = [type(part).__name__ for part in pipe.components.values() if isinstance(part, nn.Module)]
        raise ValueError(
            f"{type(pipe).__name__} must hold one network with an adapter, found {len(networks)} among {names}; "
            f"there are adapters for {', '.join(sorted(_adapters()))}"
        )
    scheduler = pipe.scheduler
    name = type(scheduler).__name__
    if hasattr(scheduler, "precondition_outputs"):
        raise ValueError(
            f"scheduler={name} scales the network's input and output itself (EDM's c_in, c_skip, c_out), so the raw "
            "output is no prediction of noise, sample or velocity at the network's input; use a scheduler without "
            "preconditioning"
        )
    prediction_type = scheduler_prediction_type(scheduler)
    foreign = _noise_settings(scheduler) if prediction_type == "flow_prediction" else {}
    if foreign:
        raise ValueError(
            f"scheduler={name} takes flow_prediction, but its config has {foreign} from the scheduler that the network "
            "was made for; use one of that family, or build the scheduler without these settings if the network was "
            "retrained for a flow"
        )
    return wrap(networks[0], from_scheduler(scheduler), prediction_type)


def _noise_settings(scheduler) -> dict:
    """What ``from_config`` carried into a flow scheduler's config from that of a noise-predicting one."""
    config = scheduler.config
    own = inspect.signature(type(scheduler).__init__).parameters
    found = {
        key: config[key] for key in ("beta_schedule", "beta_start", "beta_end") if key in config and key not in own
    }
    if config.get("prediction_type", "flow_prediction") != "flow_prediction":
        found["prediction_type"] = config["prediction_type"]
    return found
