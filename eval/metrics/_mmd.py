"""Maximum mean discrepancy between two sets of features, a block of kernel values at a time."""

from collections.abc import Callable

from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]
"""``(a, d)`` and ``(b, d)`` to ``(a, b)``."""


def squared_mmd(x: Tensor, y: Tensor, kernel: Kernel, *, unbiased: bool, block: int = 1024) -> float:
    """``E k(x, x') + E k(y, y') - 2 E k(x, y)`` of rows ``(n, d)`` and ``(m, d)``.

    Unbiased leaves the pairs ``x = x'`` of a row with itself out (a U-statistic, which may be negative); biased keeps
    them (a V-statistic).
    """
    same = [_mean(rows, rows, kernel, block, leave_out_diagonal=unbiased) for rows in (x, y)]
    return sum(same) - 2 * _mean(x, y, kernel, block, leave_out_diagonal=False)


def _mean(x: Tensor, y: Tensor, kernel: Kernel, block: int, *, leave_out_diagonal: bool) -> float:
    total = 0.0
    for start in range(0, len(x), block):
        values = kernel(x[start : start + block], y)
        if leave_out_diagonal:
            values.diagonal(offset=start).zero_()
        total += values.sum().item()
    return total / (len(x) * (len(y) - leave_out_diagonal))
