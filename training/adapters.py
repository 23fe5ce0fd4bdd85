"""Adapters of a network in training: low-rank ones through PEFT, and the smallest weights (SaRA)."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from genkit._flow_map_files import save_lora_weights
from genkit.denoisers import TwoTime
from genkit.denoisers.base import Denoiser
from genkit.denoisers.network import unwrap
from genkit.sara import add_sara, sara_layers, without_sara
from genkit.sara_files import SparseAdapter

# The projections of attention, by how Diffusers' networks and genkit's name them.
_ATTENTION = (("to_q", "to_k", "to_v", "to_out.0"), ("qkv", "proj"))


def base_network(student: Denoiser) -> nn.Module:
    """The network without the embedder of a second time."""
    return unwrap(student.network.network if isinstance(student, TwoTime) else student.module)


def add_lora(student: Denoiser, settings) -> None:
    """Put low-rank updates of rank ``rank`` and scale ``alpha / rank`` beside the weights of ``target_modules``.

    All else is frozen.

    Raises:
        ValueError: targets that match no layer.
    """
    _inject(student, settings, "default")


def add_selected(student: Denoiser, settings, whole: Sequence[nn.Module] = ()) -> None:
    """Make the smallest weights the only ones that train (:func:`genkit.sara.add_sara`).

    Args:
        whole: modules that train whole beside them.

    Raises:
        ValueError: a threshold that selects nothing or everything; names that match no layer.
    """
    try:
        add_sara(
            base_network(student),
            threshold=settings.threshold,
            num_params=settings.num_params,
            target_modules=settings.target_modules,
            exclude_modules=settings.exclude_modules,
            skip=whole,
        )
    except ValueError as error:
        raise ValueError(f"adapter.{error}") from None


def add_adapter(denoiser: Denoiser, name: str, settings) -> None:
    """Put a further LoRA beside the weights of ``denoiser``: trainable, and unused outside of :func:`using`.

    Which other weights are trainable and which adapter is in use stays as it was.

    Args:
        settings: its ``rank``, ``alpha`` and ``target_modules``, as :func:`add_lora` takes them.

    Raises:
        ValueError: a name that is taken; targets that match no layer.
    """
    if name in adapter_names(denoiser):
        raise ValueError(f"name={name!r}: the network has the adapters {sorted(adapter_names(denoiser))} already")
    trainable = {p: p.requires_grad for p in base_network(denoiser).parameters()}
    in_use = {layer: layer.active_adapters for layer in _layers(denoiser)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
        _inject(denoiser, settings, name)  # freezes all other weights and makes the new one the only one in use
    for parameter, on in trainable.items():
        parameter.requires_grad_(on)
    for layer in _layers(denoiser):
        layer._active_adapter = in_use.get(layer, [])


def can_be_switched_off(denoiser: Denoiser) -> bool:
    """Whether the network has what :func:`without_adapter` leaves out: a LoRA of any name, or a SaRA."""
    return bool(adapter_names(denoiser) or sara_layers(base_network(denoiser)))


def adapter_names(denoiser: Denoiser) -> set[str]:
    """The LoRAs that the network has."""
    return {name for layer in _layers(denoiser) for name in layer._get_available_adapters()}


def adapter_weights(denoiser: Denoiser, name: str) -> dict[str, nn.Parameter]:
    """The weights of the adapter ``name``, by their names in the network.

    Raises:
        ValueError: no such adapter.
    """
    _check_name(denoiser, name)
    return {
        f"{path}.{key}": parameter
        for path, layer in base_network(denoiser).named_modules()
        if isinstance(layer, BaseTunerLayer)
        for key, parameter in layer.named_parameters()
        if key.split(".")[0] in layer.adapter_layer_names and name in key.split(".")
    }


@contextmanager
def without_adapter(denoiser: Denoiser) -> Iterator[None]:
    """Within, the network is what it was before any adapter: a frozen reference without a second copy.

    A two-time student is then its base on the diagonal ``s = t``, where its gap embedder vanishes.

    Raises:
        ValueError: a network without adapters; gradients through checkpointed blocks.
    """
    with _switched(denoiser) as layers, without_sara(base_network(denoiser)):
        for layer in layers:
            layer._disable_adapters = True
        yield


@contextmanager
def using(denoiser: Denoiser, name: str) -> Iterator[None]:
    """Within, the adapter ``name`` and no other is in use.

    Raises:
        ValueError: no such adapter; gradients through checkpointed blocks.
    """
    _check_name(denoiser, name)
    with _switched(denoiser) as layers:
        for layer in layers:
            layer._disable_adapters, layer._active_adapter = False, [name]
        yield


@contextmanager
def _switched(denoiser: Denoiser) -> Iterator[list[BaseTunerLayer]]:
    # Not by PEFT's own enable_adapters and set_adapter: these change which weights are trainable.
    layers = _layers(denoiser)
    if not can_be_switched_off(denoiser):
        raise ValueError(
            f"{type(base_network(denoiser)).__name__} has no adapter; train with adapter.kind=lora or sara"
        )
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in base_network(denoiser).modules())
    if checkpointed and torch.is_grad_enabled():
        raise ValueError(
            "gradient checkpointing is on: backward would recompute the blocks with the adapter in use by then; "
            "train with gradient_checkpointing=false, or switch adapters under no_grad"
        )
    before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        yield layers
    finally:
        for layer, disabled, active in before:
            layer._disable_adapters, layer._active_adapter = disabled, active


def save_sara(student: Denoiser, folder: Path) -> Path:
    """Write the SaRA, as the file that genkit's pipelines take by ``load_adapter``."""
    return SparseAdapter.of(base_network(student)).save(folder)


def _layers(denoiser: Denoiser) -> list[BaseTunerLayer]:
    return [m for m in base_network(denoiser).modules() if isinstance(m, BaseTunerLayer)]


def _check_name(denoiser: Denoiser, name: str) -> None:
    names = adapter_names(denoiser)
    if name not in names:
        raise ValueError(f"name={name!r}: the network has the adapters {sorted(names) or 'none'}")


def _inject(denoiser: Denoiser, settings, name: str) -> None:
    network: Any = base_network(denoiser)
    # A layer that has an adapter is known by its own name and by that of the layer inside.
    names = [
        n
        for n, m in network.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d, BaseTunerLayer)) and not re.search(r"\.(base_layer|lora_\w+)\b", n)
    ]
    targets = settings.target_modules or _default(names)
    for target in targets:
        if not any(n == target or n.endswith(f".{target}") for n in names):
            endings = sorted({n.split(".")[-1] if not n[-1].isdigit() else ".".join(n.split(".")[-2:]) for n in names})
            raise ValueError(
                f"adapter.target_modules={target!r} matches no layer of {type(network).__name__}; "
                f"its layers end in {', '.join(endings)}"
            )
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, init_lora_weights=True)
    if hasattr(network, "add_adapter"):
        network.add_adapter(config, adapter_name=name)
    else:
        inject_adapter_in_model(config, network, adapter_name=name)


def _default(names: list[str]) -> list[str]:
    for endings in _ATTENTION:
        found = [e for e in endings if any(n.endswith(f".{e}") for n in names)]
        if found:
            return found
    raise ValueError("adapter.target_modules: the network has no attention known by name; name its layers")


def save_lora(student: Denoiser, folder: Path) -> Path:
    """Write the LoRA, with its alpha, as the file that ``pipe.load_lora_weights`` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_lora_weights(folder, base_network(student), "default")
    return folder
