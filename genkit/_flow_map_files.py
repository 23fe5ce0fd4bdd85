"""A flow-map student in a folder: its LoRA (or weights), its gap embedder, and what they belong to."""

import json
import re
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import genkit
from genkit._files import contiguous, load_into, local, read_json, read_tensors, written
from genkit.denoisers.base import FlowMap
from genkit.denoisers.network import NetworkDenoiser, from_pipeline
from genkit.denoisers.two_time import GapEmbedder, TwoTime
from genkit.sara import sara_layers
from genkit.sara_files import SARA_NAME, SparseAdapter, component, load_sara

CONFIG_NAME = "flow_map_config.json"
EMBEDDER_NAME = "gap_embedder.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"
NETWORK_NAME = "network.safetensors"
LORA_METADATA = "lora_adapter_metadata"  # Diffusers' key of the adapter's config in a LoRA file


def save_flow_map(folder: str | Path, flow_map: TwoTime, *, adapter_name: str | None = None) -> Path:
    """Write a student: its LoRA or SaRA (all of its weights where it has none), its gap embedder, and what they belong
    to.

    The LoRA is a Diffusers LoRA file, with its ``lora_alpha``: ``pipe.load_lora_weights(folder)`` takes it, without the
    gap embedder. A file is replaced only once its successor is whole.

    Args:
        folder: made where it is missing.
        adapter_name: which LoRA; needed where the network has several.

    Raises:
        ValueError: several LoRAs and no ``adapter_name``, or an unknown one.
    """
    inner = flow_map.denoiser.inner
    adapters = sorted(getattr(inner, "peft_config", {}))
    if adapter_name is None and len(adapters) > 1 or adapter_name is not None and adapter_name not in adapters:
        raise ValueError(f"adapter_name={adapter_name!r}: the network has the adapters {adapters}; name one of them")
    embedder = flow_map.network.gap_embedder
    config = {
        "_class_name": type(flow_map).__name__,
        "_genkit_version": genkit.__version__,
        "network_class": _class_name(inner),
        "prediction_type": flow_map.denoiser.prediction_type,
        "interpolant": type(flow_map.interpolant).__name__,
        "gap_embedder": {k: v for k, v in embedder.config.items() if not k.startswith("_")},
        "weights": LORA_NAME if adapters else SARA_NAME if sara_layers(inner) else NETWORK_NAME,
    }
    with written(Path(folder)) as part:
        save_file(contiguous(embedder.state_dict()), part / EMBEDDER_NAME)
        if adapters:
            save_lora_weights(part, inner, adapter_name or adapters[0])
        elif sara_layers(inner):
            SparseAdapter.of(inner).save(part)
        else:
            save_file(contiguous(inner.state_dict()), part / NETWORK_NAME)
        (part / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    return Path(folder)


def load_flow_map(
    target: DiffusionPipeline | NetworkDenoiser, folder_or_repo_id: str | Path, *, adapter_name: str = "flow_map"
) -> TwoTime:
    """A student on top of its teacher: ``load_flow_map(pipe, folder)``.

    The teacher's network is changed in place: it gets the LoRA as ``adapter_name`` (or all of the student's weights, or
    those that its SaRA changes).

    Args:
        target: a pipeline, or the denoiser of a network (:func:`genkit.denoisers.wrap`).
        folder_or_repo_id: what :func:`save_flow_map` wrote, here or on the Hub.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: truncated files, or a student of another network, prediction type or path.
    """
    denoiser = target if isinstance(target, NetworkDenoiser) else from_pipeline(target)
    if not isinstance(denoiser, NetworkDenoiser) or isinstance(denoiser, FlowMap):
        raise ValueError(
            f"target={type(target).__name__} holds a network of two times, which is its own flow map; load it with "
            "from_pretrained"
        )
    folder = local(folder_or_repo_id, [CONFIG_NAME, EMBEDDER_NAME, LORA_NAME, SARA_NAME, NETWORK_NAME])
    config = read_json(folder / CONFIG_NAME)
    wanted = {
        "_class_name": "TwoTime",
        "network_class": _class_name(denoiser.inner),
        "prediction_type": denoiser.prediction_type,
        "interpolant": type(denoiser.interpolant).__name__,
    }
    for key, value in wanted.items():
        if config.get(key) != value:
            raise ValueError(f"{folder / CONFIG_NAME}: {key} is {config.get(key)!r}, wanted {value!r}")
    try:
        embedder = GapEmbedder(**config["gap_embedder"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: gap_embedder is {config.get('gap_embedder')!r}: {error}") from error
    load_into(embedder, read_tensors(folder / EMBEDDER_NAME)[0], folder / EMBEDDER_NAME)
    weight = next(denoiser.inner.parameters())
    flow_map = TwoTime(denoiser, embedder.to(weight.device))  # before anything is changed: it may refuse
    if config.get("weights") == LORA_NAME:
        load_lora(folder / LORA_NAME, denoiser.inner, adapter_name)
    elif config.get("weights") == SARA_NAME:
        load_sara(denoiser.inner, folder / SARA_NAME)
    else:
        load_into(denoiser.inner, read_tensors(folder / NETWORK_NAME)[0], folder / NETWORK_NAME)
    return flow_map


def _class_name(network: Any) -> str:
    return network.config.get("_class_name") or type(network).__name__


def save_lora_weights(folder: Path, network: Any, adapter_name: str) -> None:
    """The LoRA of ``network`` as ``pytorch_lora_weights.safetensors``, as Diffusers reads it, with its alpha."""
    from diffusers.loaders.lora_base import LoraBaseMixin
    from peft import get_peft_model_state_dict

    prefix = component(network)
    # In PEFT's names: Diffusers' older ones (lora.down) know no convolutions, and of a file with both kinds of names it
    # would load these alone.
    layers = get_peft_model_state_dict(network, adapter_name=adapter_name)
    # Without this, a LoRA whose alpha is not its rank loads at another strength, silently.
    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in network.peft_config[adapter_name].to_dict().items()
    }
    LoraBaseMixin.write_lora_layers(
        state_dict=contiguous({f"{prefix}.{key}": value for key, value in layers.items()}),
        save_directory=str(folder),
        is_main_process=True,
        weight_name=LORA_NAME,
        save_function=None,
        safe_serialization=True,
        lora_adapter_metadata={f"{prefix}.{key}": value for key, value in settings.items()},
    )


def load_lora(file: Path, network: Any, adapter_name: str) -> None:
    """Put the LoRA of ``file`` beside the weights of ``network`` as ``adapter_name``, and it alone in use.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a name that is taken, or a LoRA of another network; nothing is changed.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if adapter_name in getattr(network, "peft_config", {}):
        raise ValueError(f"adapter_name={adapter_name!r} is taken: the network has {sorted(network.peft_config)}")
    prefix = component(network) + "."
    tensors, header = read_tensors(file)
    strange = sorted(key for key in tensors if not key.startswith(prefix))
    if strange or not tensors:
        raise ValueError(f"{file}: found {strange[:3] or 'no tensors'}, wanted keys that begin with {prefix!r}")
    modules = {name.replace(".base_layer", ""): module for name, module in network.named_modules()}
    for key, value in tensors.items():
        name = re.split(r"\.lora[._]", key.removeprefix(prefix))[0]
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise ValueError(f"{file}: found {key}, but {type(network).__name__} has no layer {name}")
        if re.search(r"lora_A|lora\.down", key) and value.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{file}: found {key} of shape {tuple(value.shape)}, wanted {weight.shape[1]} inputs; it was trained "
                f"on another {type(network).__name__}"
            )
    if LORA_METADATA not in header:
        raise ValueError(
            f"{file}: its header has no {LORA_METADATA}, so that lora_alpha is unknown; save it with genkit"
        )
    if hasattr(network, "load_lora_adapter"):
        network.load_lora_adapter(
            str(file.parent), prefix=prefix[:-1], weight_name=file.name, adapter_name=adapter_name
        )
        return
    settings = {k.removeprefix(prefix): v for k, v in json.loads(header[LORA_METADATA]).items()}
    known = LoraConfig.__dataclass_fields__
    inject_adapter_in_model(LoraConfig(**{k: v for k, v in settings.items() if k in known}), network, adapter_name)
    layers = {key.removeprefix(prefix): value for key, value in tensors.items()}
    set_peft_model_state_dict(network, layers, adapter_name=adapter_name)


def fuse_lora(network: Any) -> None:
    """Write the one LoRA into the weights, and make the network what it was without PEFT."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    unload_lora(network)


def unload_lora(network: Any) -> None:
    """Make the network what it was without PEFT."""
    from diffusers.utils import recurse_remove_peft_layers

    if hasattr(network, "unload_lora"):
        network.unload_lora()
    else:
        recurse_remove_peft_layers(network)
        del network.peft_config
