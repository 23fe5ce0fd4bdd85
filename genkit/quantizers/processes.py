"""What processes that train one codebook tell each other; a process alone talks to nobody."""

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_up(x: Tensor) -> Tensor:
    """The sum over processes, on each."""
    if count() == 1:
        return x
    alone = x.device.type == "cpu" and dist.get_backend() == "nccl"  # which sends what is on GPUs alone
    sent = x.cuda() if alone else x.clone()
    dist.all_reduce(sent)
    return sent.to(x.device)


def all_rows(x: Tensor) -> Tensor:
    """The rows ``(N, ...)`` of all processes, on each, in the order of their ranks; they may differ in number."""
    if count() == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    longest = max(int(n) for n in sizes)
    padded = torch.cat((x, x.new_zeros(longest - len(x), *x.shape[1:])))
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded.contiguous())
    return torch.cat([part[: int(n)] for part, n in zip(found, sizes, strict=True)])
