"""One pass over weights in half precision and their float32 averages: 10 bytes a weight, one launch for all."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def takes(average: Tensor, weight: Tensor) -> bool:
    """Whether the two lie in memory in one order, and where 16 bytes can be read at once."""
    return (
        weight.dtype in TYPES
        and type(weight) in (Tensor, torch.nn.Parameter)  # no shard
        and weight.stride() == average.stride()  # an average is dense
        and weight.data_ptr() % 16 == 0
    )


class Group:
    """Averages and weights of one type on one device, as a table of blocks: where both begin, and what is left."""

    def __init__(self, averages: list[Tensor], weights: list[Tensor]):
        self.addresses = addresses(averages, weights)
        self.dtype = TYPES[weights[0].dtype]
        rows = []
        for average, weight in zip(averages, weights, strict=True):
            begin = torch.arange(0, weight.numel(), BLOCK)
            rows.append(
                torch.stack((average.data_ptr() + 4 * begin, weight.data_ptr() + 2 * begin, weight.numel() - begin), 1)
            )
        self.table = torch.cat(rows).to(weights[0].device)

    def lerp_(self, step: float) -> None:
        """``a <- a + step (w - a)``."""
        if len(self.table):
            with torch.cuda.device_of(self.table):
                kernel[len(self.table),](
                    self.table, step, TYPE=self.dtype, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True
                )


def addresses(averages: list[Tensor], weights: list[Tensor]) -> list[int]:
    """Where all of them lie: a :class:`Group` holds as long as this does not change."""
    return [x.data_ptr() for x in (*averages, *weights)]


@triton.jit
def kernel(table, step, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """One row of a :class:`Group`'s table a program."""
    row = table + 3 * tl.program_id(0)
    average = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    weights = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(TYPE)), 16)
    left = tl.load(row + 2)
    if left >= BLOCK:  # without a mask, so that 16 bytes are read at once
        _move(average, weights, step, None, BLOCK)
    else:
        _move(average, weights, step, left, BLOCK)


@triton.jit
def _move(average, weights, step, left, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = None if left is None else at < left
    a = tl.load(average + at, mask=inside)
    w = tl.load(weights + at, mask=inside).to(tl.float32)
    tl.store(average + at, a + step * (w - a), mask=inside)
