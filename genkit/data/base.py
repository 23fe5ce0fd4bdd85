"""What a data source is."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from genkit.rng import ItemRNG, hash_seed


class SourceConfig(BaseModel):
    """Settings of a source; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SeededConfig(SourceConfig):
    """Settings of a source that makes its items or changes them at random."""

    seed: int = Field(default=0, description="seed of what the source draws itself")


class Source(ABC):
    """A map-style data set that reads a whole batch in one call.

    A batch is a dict: ``x0``, the clean samples ``(B, *shape)`` float32 (images in [-1, 1]), unless ``shape`` is None;
    ``class_labels``, int64 ``(B,)``, where ``num_classes`` is not None; ``prompts``, a list of str, where the source
    has them.

    ``sample_fields`` are those of its tensors that are clean samples, to be encoded where ``x0`` is.

    A subclass in its own file of ``genkit/data/`` is a source named like the file. It sets ``shape``, ``num_classes``
    and ``length`` and defines :meth:`read`. A source without ``length`` is endless: item ``i`` is made from ``i``.
    """

    Config: ClassVar[type[BaseModel]] = SourceConfig
    config: Any  # an instance of Config
    shape: tuple[int, ...] | None
    num_classes: int | None = None
    length: int | None = None
    sample_fields: ClassVar[tuple[str, ...]] = ("x0",)

    def __init__(self, **settings: Any):
        self.config = self.Config(**settings)

    @abstractmethod
    def read(self, records: Tensor, items: Tensor) -> dict[str, Any]:
        """The batch of ``records``, int64 ``(B,)`` in ``[0, length)``.

        Whatever is random about a row hangs on its entry of ``items`` (see :meth:`rng`), which differs from one visit
        of a record to the next. In an endless source both are the same.
        """

    def rng(self, items: Tensor) -> ItemRNG:
        """The random stream of each of ``items``; no other source, and nothing in training, shares it."""
        return ItemRNG(hash_seed(self.config.seed, *type(self).__qualname__.encode()), items)

    def scores(self) -> Tensor | None:
        """How good every record is, float32 ``(length,)``, where the source knows."""
        return None

    def groups(self) -> Sequence[Any] | None:
        """What every record is compared within, such as its prompt or label; ``None`` where all are of one kind."""
        return None

    def check_network(self, network: nn.Module) -> None:
        """Told of the network that is to be trained, as it was before any adapter; raises if it is the wrong one."""
        return

    def __len__(self) -> int:
        return sys.maxsize if self.length is None else self.length

    def __getitems__(self, items: Sequence[int] | Tensor) -> dict[str, Any]:
        """One batch, collated. Item ``i`` shows record ``i % len(self)``; ``i // len(self)`` counts its visits."""
        items = torch.as_tensor(items, dtype=torch.int64)
        return self.read(items if self.length is None else items % self.length, items)


def collate(batch: Any) -> Any:
    """``collate_fn`` for a ``torch.utils.data.DataLoader`` over a source: its batches are collated already."""
    return batch
