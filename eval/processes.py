"""What several processes that evaluate together tell each other; a process alone talks to nobody."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from genkit.eval.statistics import own_rows

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def join(device: str | None) -> torch.device:
    """Have the processes that ``accelerate launch`` or ``torchrun`` started evaluate together; where each computes.

    A process that was started by itself has nobody to join, and one that has joined stays so until it ends.

    Args:
        device: ``cuda`` is each process's own GPU; None for the best there is.

    Raises:
        ValueError: a device by number for several processes, or another kind than the one they were started for.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    from accelerate import PartialState

    wanted = None if device is None else torch.device(device)
    if wanted is not None and wanted.index is not None:
        raise ValueError(f"device={device!r}: each of several processes has its own; accepted is {wanted.type!r}")
    first = not dist.is_initialized()
    state = PartialState(cpu=wanted is not None and wanted.type == "cpu")
    if first:
        # Left to the interpreter's end, the threads of a process group abort now and then.
        atexit.register(state.destroy_process_group)
    if wanted is not None and wanted.type != state.device.type:
        raise ValueError(f"device={device!r}: these processes were started for {state.device.type!r}")
    return state.device if state.device.type == "cuda" else torch.device(state.device.type)


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process evaluates by itself and waits for no other: in training, where one alone samples."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def rank_and_count() -> tuple[int, int]:
    """Which process this is, and of how many."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def own(n: int, batch_size: int = 1) -> Tensor:
    """Which of n rows are this process's: neighbours, each row once over all processes.

    Whole batches, as one process would cut them: a network's answer depends on the size of the batch in the last bits,
    so that only then any number of processes measure the same.
    """
    batches = own_rows(-(-n // batch_size), *rank_and_count())
    first = int(batches[0]) * batch_size if len(batches) else n
    return torch.arange(first, min(first + len(batches) * batch_size, n))


def gather(value: Any) -> list[Any]:
    """What each process gives, on every process, in the order of their ranks."""
    _, count = rank_and_count()
    if count == 1:
        return [value]
    found: list[Any] = [None] * count
    dist.all_gather_object(found, value)
    return found


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks, which is that of :func:`own`."""
    return torch.cat(gather(rows.cpu()))


def per_image(total: int, images: int) -> float | None:
    """What all processes counted, over the images that all made; ``None`` of none. All must ask."""
    totals, counts = zip(*gather((total, images)), strict=True)
    return sum(totals) / sum(counts) if sum(counts) else None


def wait() -> None:
    """Until every process has come here."""
    if rank_and_count()[1] > 1:
        dist.barrier()
