"""An infinite, exactly resumable stream of batches."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from genkit.data.base import Source, collate
from genkit.rng import hash_seed


@lru_cache(maxsize=2)  # a batch touches two epochs at their border
def _permutation(seed: int, epoch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash_seed(seed, epoch))
    return torch.randperm(length, generator=generator)


class _Stream(Dataset):
    """Positions of the stream -> batch: position ``p`` shows entry ``p % n`` of the permutation of epoch ``p // n``."""

    def __init__(self, source: Source, seed: int, shuffle: bool):
        self.source, self.seed, self.shuffle = source, seed, shuffle

    def __getitems__(self, positions: range) -> dict[str, Any]:
        index = torch.arange(positions.start, positions.stop)
        batch = self.source.__getitems__(self._items(positions, index))
        return {**batch, "index": index}

    def _items(self, positions: range, index: Tensor) -> Tensor:
        if self.source.length is None or not self.shuffle:
            return index
        n = self.source.length
        parts = []
        for epoch in range(positions.start // n, (positions.stop - 1) // n + 1):
            start, stop = max(positions.start - epoch * n, 0), min(positions.stop - epoch * n, n)
            parts.append(_permutation(self.seed, epoch, n)[start:stop] + epoch * n)
        return torch.cat(parts)


class _Positions:
    """The ranges of positions that one rank reads, micro-batch after micro-batch, from ``start_step`` on for ever."""

    def __init__(self, global_batch_size: int, start_step: int, rank: int, size: int, micro_batches: int):
        self.global_batch_size, self.start_step, self.rank = global_batch_size, start_step, rank
        self.size, self.micro_batches = size, micro_batches

    def __iter__(self) -> Iterator[range]:
        step = self.start_step
        while True:
            start = step * self.global_batch_size + self.rank * self.size * self.micro_batches
            for _ in range(self.micro_batches):
                yield range(start, start + self.size)
                start += self.size
            step += 1


def batches(
    source: Source,
    global_batch_size: int,
    *,
    seed: int = 0,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    micro_batches: int = 1,
    shuffle: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Any]]:
    """Micro-batches of ``source`` for one rank, without end: ``micro_batches`` of them make a step.

    Step ``k`` takes positions ``[k G, (k+1) G)`` of an endless run of shuffled epochs, whose order is a pure function
    of ``(seed, epoch)``. Ranks take contiguous slices of a step and micro-batches contiguous slices of those, so
    neither changes what a step sees; a run resumes exactly by ``start_step=k``. Each batch also holds ``index``, int64
    ``(B,)``: the position, an identity of the item for :class:`genkit.rng.ItemRNG`.

    Args:
        num_workers: processes that read ahead, for slow sources; 0 reads in this process, at no overhead.
        pin_memory: have the batches in page-locked memory (with workers).

    Raises:
        ValueError: an empty source; a batch size below 1 or not a multiple of ``world_size * micro_batches``; a rank
            outside ``[0, world_size)``; a negative ``start_step`` or ``num_workers``.
    """
    limits = dict(
        global_batch_size=(global_batch_size, 1), world_size=(world_size, 1), micro_batches=(micro_batches, 1)
    )
    limits |= dict(start_step=(start_step, 0), num_workers=(num_workers, 0), rank=(rank, 0))
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if rank >= world_size:
        raise ValueError(f"rank={rank}: must be below world_size={world_size}")
    if global_batch_size % (world_size * micro_batches):
        raise ValueError(
            f"global_batch_size={global_batch_size}: must be a multiple of world_size * micro_batches = "
            f"{world_size} * {micro_batches}"
        )
    if source.length == 0:
        raise ValueError(f"source {type(source).__name__} is empty")
    if pin_memory and not num_workers:
        raise ValueError("pin_memory=True needs num_workers of at least 1")
    stream = _Stream(source, seed, shuffle)
    size = global_batch_size // (world_size * micro_batches)
    positions = _Positions(global_batch_size, start_step, rank, size, micro_batches)
    if num_workers == 0:
        return map(stream.__getitems__, positions)
    # The generator is the loader's own: by default it would draw from the global one and change what the run draws.
    return iter(
        DataLoader(
            stream,
            batch_sampler=positions,  # type: ignore[arg-type]  # ranges, which are cheaper to send than lists
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=collate,
            generator=torch.Generator(),
        )
    )
