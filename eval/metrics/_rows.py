"""Features as every metric wants them: float64 on the CPU, finite, and enough of them."""

import torch
from torch import Tensor


def checked(side: str, rows: Tensor, at_least: int, why: str) -> Tensor:
    """``rows`` ``(n, d)`` in float64 on the CPU.

    Args:
        side: ``reference`` or ``generated``, for errors.
        at_least, why: how many rows are needed, and what for.

    Raises:
        ValueError: another shape, too few rows, or a row that is not finite, by its number.
    """
    if rows.ndim != 2:
        raise ValueError(f"{side} set: features of shape {tuple(rows.shape)}; accepted are (n, d)")
    if len(rows) < at_least:
        raise ValueError(f"{side} set: {len(rows)} features, but {why} needs at least {at_least}")
    bad = (~rows.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"{side} set: feature row {int(bad[0])} is not finite ({len(bad)} such rows)")
    return rows.detach().to("cpu", torch.float64)


def checked_pair(reference: Tensor, generated: Tensor, at_least: int, why: str) -> tuple[Tensor, Tensor]:
    """Both sets so, of the same number of dimensions."""
    x, y = (checked(side, rows, at_least, why) for side, rows in (("reference", reference), ("generated", generated)))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the reference has {x.shape[1]} feature dimensions, the generated set {y.shape[1]}")
    return x, y
