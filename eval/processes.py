"""What several processes that evaluate together tell each other; a process alone talks to nobody."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from genkit.eval.statistics import own_rows


def rank_and_count() -> tuple[int, int]:
    """Which process this is, and of how many."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def own(n: int) -> Tensor:
    """Which of n rows are this process's: neighbours, each row once over all processes."""
    return own_rows(n, *rank_and_count())


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


def wait() -> None:
    """Until every process has come here."""
    if rank_and_count()[1] > 1:
        dist.barrier()
