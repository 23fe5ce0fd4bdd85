"""Another source, and beside each of its samples a generated one under the same condition."""

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file

from genkit.data.base import SeededConfig, Source
from genkit.registry import lookup


class Inner(BaseModel):
    """A source by name, and its settings beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    def make(self) -> Source:
        """The source.

        Raises:
            ValueError: an unknown name; a setting that it refuses.
        """
        return lookup("genkit.data", Source, self.name, setting="data.real.name")(**(self.model_extra or {}))


class WithFakesConfig(SeededConfig):
    """Settings of real samples with fakes."""

    real: Inner = Field(description="the source of real samples: its name, and its settings beside it")
    fakes: Path = Field(description="folder of shards, safetensors with `fake` and `class_labels` or `records`")


class WithFakes(Source):
    """The batches of ``real`` with a field ``fake``, samples of a model in its network's space.

    Where the fakes have classes, a real sample gets one of its own, drawn anew at every visit: fakes then follow the
    class law of the data. Where they have records, it gets one that was made under that record's condition (its
    prompt), and records without a fake are left out. Else it gets any.

    Raises:
        ValueError: no shards in ``fakes``; while reading, a class that no fake has.
    """

    Config = WithFakesConfig

    def __init__(self, **settings):
        super().__init__(**settings)
        self.real = self.config.real.make()
        self.shape, self.num_classes = self.real.shape, self.real.num_classes
        files = sorted(self.config.fakes.glob("*.safetensors"))
        if not files:
            raise ValueError(f"data.fakes={str(self.config.fakes)!r} holds no shards (*.safetensors)")
        shards = [load_file(file) for file in files]
        self.fakes = torch.cat([shard["fake"] for shard in shards])
        self._name = next((name for name in ("class_labels", "records") if name in shards[0]), None)
        key = torch.cat([shard[self._name] for shard in shards]) if self._name else torch.zeros(len(self.fakes)).long()
        self._order = key.argsort(stable=True)  # those of each key next to each other
        self._keys, self._counts = key.unique(return_counts=True)
        self._starts = self._counts.cumsum(0) - self._counts
        self.length = len(self._keys) if self._name == "records" else self.real.length

    def read(self, records, items):
        shown, key = items, torch.zeros_like(items)
        if self._name == "records":  # the same visits, of the records that have fakes
            key = self._keys[records]
            shown = key + (0 if self.real.length is None else items // self.length * self.real.length)
        batch = self.real.__getitems__(shown)
        if self._name == "class_labels":
            key = batch["class_labels"]
        place = torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)
        missing = key[self._keys[place] != key].tolist()
        if missing:
            raise ValueError(f"data.fakes={str(self.config.fakes)!r} holds no fake of class {missing[0]}; make more")
        within = (self.rng(items).uniform(dtype=torch.float64) * self._counts[place]).long()
        return {**batch, "fake": self.fakes[self._order[self._starts[place] + within]]}
