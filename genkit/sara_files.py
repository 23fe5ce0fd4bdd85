"""A SaRA in a file: which entries of which weights it changes, by how much, and of what base model they are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit._files import read_tensors, save_tensors
from genkit.sara import at, fingerprint, plain, sara_layers

SARA_NAME = "sara_weights.safetensors"
_METADATA, _FORMAT = "sara", "genkit.sara/1"


@dataclass(frozen=True)
class SparseAdapter:
    """Changes of single entries of weights, by the names of these.

    Attributes:
        network: what the network is called in a pipeline.
        changes: places in the flattened weight, and what is added there.
        base: of each weight its ``shape``, and under ``sha256`` what the base model's is known by, by dtype.
    """

    network: str
    changes: Mapping[str, tuple[Tensor, Tensor]]
    base: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, network: nn.Module) -> "SparseAdapter":
        """That of a network with a SaRA, as it is now.

        Raises:
            ValueError: it has none.
        """
        layers = sara_layers(network)
        if not layers:
            raise ValueError(f"{type(network).__name__} has no SaRA; add_sara(network) makes one")
        weights = _weights(network)
        return cls(
            component(network),
            {name: (sara.index.clone(), sara.delta.detach().clone()) for name, sara in layers.items()},
            {name: {"shape": list(weights[name].shape), "sha256": sara.hashes} for name, sara in layers.items()},
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``sara_weights.safetensors`` into ``folder``; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, (index, delta) in self.changes.items():
            tensors[f"{self.network}.{name}.index"], tensors[f"{self.network}.{name}.delta"] = index.cpu(), delta.cpu()
        # Under one key: safetensors writes several in an order that differs from process to process.
        save_tensors(folder / SARA_NAME, tensors, {_METADATA: json.dumps({"format": _FORMAT, "base": self.base})})
        return folder

    @classmethod
    def read(cls, file: Path) -> "SparseAdapter":
        """That of a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is truncated, of another format, or its parts contradict each other.
        """
        tensors, header = read_tensors(file)
        told = json.loads(header.get(_METADATA, "{}"))
        if told.get("format") != _FORMAT:
            raise ValueError(f"{file}: format is {told.get('format')!r}, wanted {_FORMAT!r}")
        base = told["base"]
        networks = {key.partition(".")[0] for key in tensors}
        if len(networks) != 1:
            raise ValueError(f"{file}: changes of {sorted(networks) or 'nothing'}, wanted those of one network")
        (network,) = networks
        wanted = {f"{network}.{name}.{part}" for name in base for part in ("index", "delta")}
        if wanted != set(tensors):
            raise ValueError(f"{file}: its tensors and its header differ in {sorted(wanted ^ set(tensors))[:3]}")
        changes = {name: (tensors[f"{network}.{name}.index"], tensors[f"{network}.{name}.delta"]) for name in base}
        for name, (index, delta) in changes.items():
            size = torch.Size(base[name]["shape"]).numel()
            if index.shape != delta.shape or len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ValueError(
                    f"{file}: {name} has {len(index)} places for {len(delta)} values, or some beyond {size}"
                )
            if not delta.isfinite().all():
                raise ValueError(f"{file}: {name} has values that are not finite")
        return cls(network, changes, base)


def mixed(adapters: Sequence[tuple[SparseAdapter, float]]) -> tuple[SparseAdapter, int]:
    """``sum_m s_m delta_m`` of adapters of one base model, and how many places more than one of them changes.

    There their changes add up, as those of LoRAs do; a sum of one with weight 1 is that one, to the bit.

    Raises:
        ValueError: none, or adapters of different networks or base models.
    """
    if not adapters:
        raise ValueError("adapters=[]: at least one is needed")
    first = adapters[0][0]
    for other, _ in adapters[1:]:
        if other.network != first.network:
            raise ValueError(
                f"the adapters are of different networks, {first.network} and {other.network}; those of one can be "
                "mixed"
            )
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    base: dict[str, Mapping[str, Any]] = {}
    shared = 0
    for name in dict.fromkeys(name for adapter, _ in adapters for name in adapter.changes):
        parts = [(a.changes[name], weight) for a, weight in adapters if name in a.changes]
        bases = [(a.base[name]["shape"], a.base[name]["sha256"]) for a, _ in adapters if name in a.changes]
        if any(other != bases[0] for other in bases):
            raise ValueError(f"{name}: the adapters are of different base models; those of one can be mixed")
        every = torch.cat([index for (index, _), _ in parts])
        places, where, counts = every.unique(return_inverse=True, return_counts=True)
        shared += int((counts > 1).sum())
        scaled = torch.cat([weight * delta.double() for (_, delta), weight in parts])
        total = torch.zeros(len(places), dtype=torch.float64).index_add_(0, where, scaled)
        changes[name] = places, total.to(parts[0][0][1].dtype)
        base[name] = next(a.base[name] for a, _ in adapters if name in a.changes)
    return SparseAdapter(first.network, changes, base), shared


class Applied:
    """Adapters in the weights of ``network``, in place: nothing is added to its inference.

    Attributes:
        shared: how many places more than one of them changes; their changes add up there.

    Raises:
        ValueError: adapters of another network or base model; nothing is changed.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module, adapters: Sequence[tuple[SparseAdapter, float]]):
        self.weights = _weights(network)
        for adapter, _ in adapters:
            _check(network, self.weights, adapter)
        total, self.shared = mixed(adapters)
        self.before: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (index, delta) in total.changes.items():
            weight = self.weights[name].data
            view, places = at(weight, index.to(weight.device))
            self.before[name] = index, view[places]
            view[places] = (view[places].to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what was there before, to the bit."""
        for name, (index, values) in self.before.items():
            weight = self.weights[name].data
            view, places = at(weight, index.to(weight.device))
            view[places] = values.to(weight)


def load_sara(network: nn.Module, path: str | Path, scale: float = 1.0) -> Applied:
    """Add ``scale`` times the changes of a saved SaRA to the weights of its base model; ``undo`` takes them away.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an adapter of another network or base model; nothing is changed.
    """
    file = Path(path)
    return Applied(network, [(SparseAdapter.read(file / SARA_NAME if file.is_dir() else file), scale)])


def component(network: nn.Module) -> str:
    """What ``network`` is called in a pipeline, and begins its keys in files with."""
    return "unet" if "UNet" in type(network).__name__ else "transformer"


def _weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Weights by the names that they have without PEFT and SaRA."""
    return {
        plain(name).replace("parametrizations.weight.original", "weight"): weight
        for name, weight in network.named_parameters(remove_duplicate=False)
    }


def _check(network: nn.Module, weights: Mapping[str, Tensor], adapter: SparseAdapter) -> None:
    what, live = type(network).__name__, sara_layers(network)
    if live:
        raise ValueError(f"{what} has a SaRA that trains; merge_sara(network) or remove_sara(network) first")
    for name, told in adapter.base.items():
        weight = weights.get(name)
        if weight is None or list(weight.shape) != told["shape"]:
            found = "nothing" if weight is None else tuple(weight.shape)
            raise ValueError(f"the SaRA is of another network: {name} of {tuple(told['shape'])}; {what} has {found}")
        dtype = str(weight.dtype).removeprefix("torch.")
        known = told["sha256"].get(dtype, told["sha256"]["float32"])
        found = fingerprint(weight if dtype in told["sha256"] else weight.float())
        if found == known:
            continue
        for half in (torch.bfloat16, torch.float16):
            if fingerprint(weight.to(half).float()) == told["sha256"]["float32"]:
                raise ValueError(
                    f"the SaRA is of this base model in {half}, and {name} is in {dtype}; load the model with "
                    f"dtype={half}"
                )
        raise ValueError(
            f"the SaRA is of another base model: {name} has the hash {found} in {dtype}, wanted {known}; load the "
            "weights that it was trained on, and other SaRAs together with it"
        )
