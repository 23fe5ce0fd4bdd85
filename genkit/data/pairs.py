"""Pairs of a model: noise, and where the model's own sampling takes it, as ``genkit pairs`` wrote them."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor, nn

from genkit._files import read_json
from genkit.data.base import Source, SourceConfig
from genkit.rng import ItemRNG, hash_seed

MANIFEST = "pairs.json"
FORMAT = "genkit.pairs/1"


def noise(seed: int, items: Tensor | range | list[int], shape: tuple[int, ...]) -> Tensor:
    """The noise of pairs ``items``, ``(B, *shape)`` float32 on the CPU: a function of ``(seed, item)`` alone."""
    return ItemRNG(hash_seed(seed, 0x70616972), items).normal(shape)


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of the network's weights as float32, by name; adapters (LoRA) beside them do not count."""
    digest = hashlib.sha256()
    state = {k.replace(".base_layer", ""): v for k, v in network.state_dict().items() if "lora_" not in k}
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The tensors of shard ``number``, and the record that says that they are whole."""
    name = f"shard-{number:05d}"
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def shard_record(folder: Path, manifest: dict[str, Any], number: int) -> dict[str, Any] | None:
    """The record of shard ``number`` if it is there, of full size and with all its items; ``None`` if it must be made.

    Its items are ``shard_size`` each, the last shard has the rest of ``num``.
    """
    tensors, record = shard_paths(folder, number)
    if not record.is_file() or not tensors.is_file():
        return None
    read = read_json(record)
    items = shard_items(manifest, number)
    whole = tensors.stat().st_size == read["bytes"] and [read["first"], read["stop"]] == [items.start, items.stop]
    return read if whole else None


def shard_items(manifest: dict[str, Any], number: int) -> range:
    """The items of shard ``number``."""
    size = manifest["shard_size"]
    return range(number * size, min((number + 1) * size, manifest["num"]))


def shard_count(manifest: dict[str, Any]) -> int:
    """How many shards there are."""
    return -(-manifest["num"] // manifest["shard_size"])


def sha256(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(opened)


def _digest(opened) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := opened.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class PairsConfig(SourceConfig):
    """Settings of stored pairs."""

    path: Path = Field(description="folder that `genkit pairs` wrote")
    any_model: bool = Field(default=False, description="train a model other than the one that made the pairs")


class Pairs(Source):
    """``x0`` and ``eps`` ``(B, *shape)`` in the model's own space, with the class labels or prompts they were made of,
    and ``score`` ``(B,)`` where they were scored.

    Noise that was not stored is drawn again from its seed, which is verified when the source is made. A shard's
    checksum is verified when it is first read.

    Raises:
        FileNotFoundError: no pairs there.
        ValueError: shards that are missing, truncated or changed; noise that comes out differently here; at
            :meth:`check_network`, pairs of another model.
    """

    Config = PairsConfig
    shape: tuple[int, ...]

    def __init__(self, **settings):
        super().__init__(**settings)
        self.folder: Path = self.config.path
        self.manifest = read_manifest(self.folder)
        self.shape = tuple(self.manifest["shape"])
        self.num_classes = self.manifest["num_classes"]
        found = [shard_record(self.folder, self.manifest, k) for k in range(shard_count(self.manifest))]
        missing = [number for number, record in enumerate(found) if record is None]
        if missing:
            raise ValueError(
                f"path={str(self.folder)!r} lacks {len(missing)} of {len(found)} shards, the first is "
                f"{shard_paths(self.folder, missing[0])[0].name}; run `genkit pairs` again with the same settings, "
                "which makes what is missing"
            )
        self.records = [record for record in found if record is not None]
        self.counts = torch.tensor([record["count"] for record in self.records])
        self.length = int(self.counts.sum())
        check_noise(self.manifest, self.folder)

    def check_network(self, network: nn.Module) -> None:
        """Refuse to train a network that did not make the pairs, unless ``any_model``.

        Raises:
            ValueError: its weights are others.
        """
        if not self.config.any_model and fingerprint(network) != self.manifest["weights"]:
            raise ValueError(
                f"path={str(self.folder)!r} holds pairs of {self.manifest['pipeline']!r} "
                f"({self.manifest['network']}, weights {self.manifest['weights'][:12]}), and the model that is trained "
                f"has other weights ({fingerprint(network)[:12]}): its own pairs would straighten it, those of another "
                "bend it. Make its pairs with `genkit pairs`, or set data.any_model=true to distil that model into it"
            )

    def read(self, records, items):
        ends = self.counts.cumsum(0)
        shards = torch.searchsorted(ends, records, right=True)
        rows = records - (ends - self.counts)[shards]
        found = [self._shard(s).row(r) for s, r in zip(shards.tolist(), rows.tolist(), strict=True)]
        x0 = torch.stack([row["x0"] for row in found]).float()
        if "eps" in found[0]:
            eps = torch.stack([row["eps"] for row in found])
        else:
            eps = noise(self.manifest["seed"], torch.stack([row["item"] for row in found]), self.shape)
        batch: dict[str, Any] = {"x0": x0, "eps": eps}
        if "score" in found[0]:
            batch["score"] = torch.stack([row["score"] for row in found])
        if self.num_classes is not None:
            batch["class_labels"] = torch.stack([row["class_labels"] for row in found])
        elif "prompt" in found[0]:
            batch["prompts"] = [row["prompt"] for row in found]
        return batch

    def scores(self) -> Tensor | None:
        """Those that ``genkit pairs --reward`` gave."""
        if self.manifest.get("reward") is None:
            return None
        return torch.cat([_header(self.folder, number, "score") for number in range(len(self.records))])

    def groups(self) -> list[Any] | None:
        """Their prompts or labels."""
        found = [_asked(self.folder, number, self.manifest["asked"]["as"]) for number in range(len(self.records))]
        return None if found[0] is None else [value for shard in found for value in shard or ()]

    def _shard(self, number: int) -> "_Shard":
        return _opened(shard_paths(self.folder, number)[0], self.records[number]["sha256"])


def _header(folder: Path, number: int, name: str) -> Tensor:
    with safe_open(shard_paths(folder, number)[0], framework="pt") as opened:
        return opened.get_tensor(name)


def _asked(folder: Path, number: int, given: str | None) -> list[Any] | None:
    """What the samples of a shard were made of."""
    if given == "class_labels":
        return _header(folder, number, given).tolist()
    with safe_open(shard_paths(folder, number)[0], framework="pt") as opened:
        return json.loads(opened.metadata().get("prompts", "null"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The settings that the pairs in ``folder`` were made with.

    Raises:
        FileNotFoundError: none there.
        ValueError: another format.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"path={str(folder)!r} has no {MANIFEST}; make pairs with `genkit pairs`")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST} is of format {manifest.get('format')!r}; accepted is {FORMAT!r}")
    return manifest


def check_noise(manifest: dict[str, Any], folder: Path) -> None:
    """Draw the first item's noise again.

    Raises:
        ValueError: it is not what it was.
    """
    again = noise(manifest["seed"], [0], tuple(manifest["shape"])).flatten()[:8]
    was = torch.tensor(manifest["noise_check"])
    if not torch.allclose(again, was, atol=1e-5, rtol=1e-5):
        raise ValueError(
            f"{folder / MANIFEST}: seed={manifest['seed']} gives the noise {again.tolist()} here, and gave "
            f"{was.tolist()} where the pairs were made"
        )


class _Shard:
    """The rows of one file, memory-mapped."""

    def __init__(self, file: Path, checksum: str):
        if sha256(file) != checksum:
            raise ValueError(f"{file} is not what was written: its checksum differs; delete it and run `genkit pairs`")
        opened = safe_open(file, framework="pt")
        self.slices = {key: opened.get_slice(key) for key in opened.keys()}
        self.prompts = json.loads((opened.metadata() or {}).get("prompts", "null"))

    def row(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = {key: value[i] for key, value in self.slices.items()}
        return row if self.prompts is None else {**row, "prompt": self.prompts[i]}


_opened = lru_cache(maxsize=256)(_Shard)  # every process opens its own
