"""Adapters after training: scaled, several mixed into one, written into the weights."""

import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from genkit._files import contiguous, listing, read_tensors, written
from genkit._flow_map_files import CONFIG_NAME, LORA_METADATA, LORA_NAME, fuse_lora
from genkit.denoisers.network import unwrap
from genkit.sara import merge_sara, sara_layers
from genkit.sara_files import SARA_NAME, SparseAdapter, mixed

_PAIR = re.compile(r"(?P<layer>.+?)\.(?P<side>lora_A|lora\.down|lora_B|lora\.up)\.weight")


@dataclass
class _Layer:
    """A low-rank update ``scale * up @ down``."""

    down: Tensor  # (r, inputs, ...)
    up: Tensor  # (outputs, r, ...)
    scale: float

    @property
    def ends(self) -> tuple[int, tuple[int, ...]]:
        """Number of outputs, and shape of the inputs: those of the weight beside it."""
        return self.up.shape[0], tuple(self.down.shape[1:])


def fused(network: nn.Module) -> nn.Module:
    """A copy with the LoRA or SaRA written into the weights; ``network`` itself where it has none."""
    inner = unwrap(network)
    if not getattr(inner, "peft_config", None) and not sara_layers(inner):
        return network
    made = copy.deepcopy(inner)
    fuse(made)
    return made


def fuse(network: nn.Module) -> None:
    """Write its LoRA or SaRA into the weights of ``network``, and make it one without an adapter."""
    merge_sara(network)
    if getattr(network, "peft_config", None):
        fuse_lora(network)


def mix_adapters(adapters: Sequence[tuple[str | Path, float]], output: Path, *, scale: float = 1.0) -> Path:
    """Write the LoRA whose update of every weight is ``scale sum_m s_m (alpha_m / r_m) B_m A_m``; returns the folder.

    Exact, and linear in ``s``: ranks are concatenated, ``A`` of all adapters stacked, ``B`` stacked as ``s_m (alpha_m /
    r_m) B_m``. Averaging ``A`` and ``B`` apart would be another model, with products ``B_1 A_2``. The rank of the
    result is the sum of theirs, with zeros in layers that only some have, and its alpha is its rank. One adapter is
    scaled. SaRAs of one base model are mixed likewise: the changes of an entry add up, and ``mix.json`` says how many
    entries more than one of them changes (``shared``).

    Args:
        adapters: folders with a ``pytorch_lora_weights.safetensors``, as training and Diffusers write it, or with a
            ``sara_weights.safetensors``, or such files, each with its ``s``.
        output: a folder to make; ``pipe.load_lora_weights`` takes it, of SaRAs ``load_adapter`` of genkit's pipelines.
        scale: of the whole.

    Raises:
        FileNotFoundError: no such adapter.
        ValueError: adapters of different networks, a LoRA and a SaRA, half a layer, tensors that are no LoRA's, a
            weight that is not finite, the adapter of a flow map, or an ``output`` that is not empty; nothing is
            written.

    Source: Clark et al., "Directly fine-tuning diffusion models on differentiable rewards", arXiv 2309.17400, on
    scaling and mixing.
    """
    if not adapters:
        raise ValueError("adapters=[]: at least one is needed")
    for name, value in [*((f"adapter {path}", weight) for path, weight in adapters), ("scale", scale)]:
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: accepted is a finite number")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} is not empty; choose another folder")
    files = [_file(Path(path)) for path, _ in adapters]
    weights = [scale * weight for _, weight in adapters]
    record: dict[str, Any] = {"adapters": [{"path": str(path), "weight": weight} for path, weight in adapters]}
    record["scale"] = scale
    sparse = [file.name == SARA_NAME for file in files]
    if any(sparse) and not all(sparse):
        raise ValueError(
            f"{files[sparse.index(True)]} is a SaRA, {files[sparse.index(False)]} a LoRA: no file holds both; load one "
            "after the other"
        )
    if all(sparse):
        total, record["shared"] = mixed([(SparseAdapter.read(f), w) for f, w in zip(files, weights, strict=True)])
    else:
        tensors, settings = _mixed_loras(files, weights)
    with written(output) as part:
        if all(sparse):
            total.save(part)
        else:
            save_file(contiguous(tensors), part / LORA_NAME, {"format": "pt", LORA_METADATA: json.dumps(settings)})
        (part / "mix.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return output


def _mixed_loras(files: list[Path], weights: list[float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of the sum."""
    read = [_layers(file) for file in files]
    _check(files, read)
    tensors: dict[str, Tensor] = {}
    networks: dict[str, list[str]] = {}
    for layer in dict.fromkeys(name for layers in read for name in layers):
        networks.setdefault(layer.partition(".")[0], []).append(layer)
    settings: dict[str, Any] = {}
    for network, names in networks.items():
        rank = max(sum(len(layers[name].down) for layers in read if name in layers) for name in names)
        for name in names:
            parts = [(layers[name], weight) for layers, weight in zip(read, weights, strict=True) if name in layers]
            # PEFT's names alone: of a file that also has Diffusers' older ones, Diffusers would load only a part.
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = _stacked(parts, rank)
        targets = sorted(name.removeprefix(f"{network}.") for name in names)
        settings |= {f"{network}.r": rank, f"{network}.lora_alpha": rank, f"{network}.target_modules": targets}
    return tensors, settings


def _stacked(parts: list[tuple[_Layer, float]], rank: int) -> tuple[Tensor, Tensor]:
    """``down`` and ``up`` of a layer, of this rank, in float32 at least."""
    dtype = torch.promote_types(torch.float32, parts[0][0].up.dtype)
    down = torch.cat([layer.down.to(dtype) for layer, _ in parts])
    up = torch.cat([(layer.scale * weight * layer.up.double()).to(dtype) for layer, weight in parts], 1)
    missing = rank - len(down)
    down = torch.cat((down, down.new_zeros(missing, *down.shape[1:])))
    return down, torch.cat((up, up.new_zeros(len(up), missing, *up.shape[2:])), 1)


def _file(path: Path) -> Path:
    file = path
    if path.is_dir():
        if (path / CONFIG_NAME).is_file():
            raise ValueError(f"{path} holds a flow map, whose second time a LoRA file cannot hold; it cannot be mixed")
        file = path / (SARA_NAME if (path / SARA_NAME).is_file() else LORA_NAME)
    if not file.is_file():
        raise FileNotFoundError(missing(path, [LORA_NAME, SARA_NAME]))
    return file


def missing(path: Path, names: Sequence[str]) -> str:
    """What to say of a path that is no file, nor a folder with a file of one of these names."""
    wanted = f"wanted a folder with a {' or '.join(names)}, or such a file"
    if not path.is_dir():
        return f"{path} is no file; {wanted}"
    # The folder of a run has its adapters in folders of their own.
    below = sorted({str(file.parent) for name in names for file in path.glob(f"*/{name}")})
    hint = f"; there is one in {', '.join(below)}" if below else ""
    return f"{path} holds {listing(path)}, no adapter{hint}; {wanted}"


def _layers(file: Path) -> dict[str, _Layer]:
    """The layers of a LoRA by their names, the network's first: ``unet.mid_block ... to_q``."""
    tensors, header = read_tensors(file)
    sides: dict[str, dict[str, str]] = {}
    for key in sorted(tensors):
        found = _PAIR.fullmatch(key)
        if found is None or "." not in found["layer"]:
            raise ValueError(
                f"{file}: found {key!r}; accepted are the matrices of a LoRA, such as unet.LAYER.lora_A.weight"
            )
        sides.setdefault(found["layer"], {})["down" if found["side"] in ("lora_A", "lora.down") else "up"] = key
    if not sides:
        raise ValueError(f"{file} holds no tensors")
    settings = json.loads(header.get(LORA_METADATA, "{}"))
    layers = {}
    for layer, names in sides.items():
        if len(names) < 2:
            (side,) = names
            raise ValueError(f"{file}: found {names[side]!r} without the {'down' if side == 'up' else 'up'} matrix")
        down, up = tensors[names["down"]], tensors[names["up"]]
        if len(down) != up.shape[1]:
            raise ValueError(f"{file}: {layer} has ranks {len(down)} and {up.shape[1]} in its two matrices")
        network, _, name = layer.partition(".")
        own = {k.removeprefix(f"{network}."): v for k, v in settings.items() if k.startswith(f"{network}.")}
        layers[layer] = _Layer(down, up, _scale(file, own, name, len(down)))
    return layers


def _scale(file: Path, settings: dict[str, Any], layer: str, rank: int) -> float:
    """``alpha / r`` as PEFT has it; 1 where the file does not say, as in Diffusers."""
    if settings.get("use_dora"):
        raise ValueError(f"{file}: a DoRA normalises its weights, so that several do not add up; it cannot be mixed")
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _check(files: list[Path], read: list[dict[str, _Layer]]) -> None:
    """Refuse adapters of different networks."""
    for file, layers in zip(files[1:], read[1:], strict=True):
        ours, theirs = ({name.partition(".")[0] for name in part} for part in (read[0], layers))
        if not ours & theirs:
            raise ValueError(f"{files[0]} is of {sorted(ours)}, {file} of {sorted(theirs)}: different networks")
    first: dict[str, tuple[Path, _Layer]] = {}
    for file, layers in zip(files, read, strict=True):
        for name, layer in layers.items():
            other_file, other = first.setdefault(name, (file, layer))
            if layer.ends != other.ends:
                raise ValueError(
                    f"{name} has {other.ends[0]} outputs and inputs {other.ends[1]} in {other_file}, {layer.ends[0]} "
                    f"and {layer.ends[1]} in {file}: adapters of different networks"
                )


def parse_adapter(text: str) -> tuple[str, float]:
    """``folder=0.7``, or ``folder`` alone for weight 1, as a command line has it.

    Raises:
        ValueError: a weight that is no number.
    """
    path, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise ValueError(f"adapter {text!r}: {weight!r} is no number; accepted is FOLDER=0.7") from None
