"""The smallest entries of many weights together."""

import torch
from torch import Tensor


def smallest(
    weights: list[Tensor], threshold: float, count: int | None, everything: bool
) -> tuple[list[Tensor], float]:
    """The weights to select from, and the threshold below which their entries are selected.

    Args:
        count: instead of a threshold, how many entries at most to select; it is then the next larger one.
        everything: also of weights that lie below the threshold as a whole.

    Raises:
        ValueError: nothing is selected, or everything.
    """
    total = sum(w.numel() for w in weights)
    if count is not None and not 0 < count < total:
        raise ValueError(f"num_params={count}: accepted are 1 to {total - 1}, of {total} entries")
    largest = [float(w.detach().abs().max()) for w in weights]
    kept = [i for i, top in enumerate(largest) if everything or top > 0]
    while True:
        left = [weights[i] for i in kept]
        size = sum(w.numel() for w in left)
        if count is not None and count >= size:
            raise ValueError(f"num_params={count} selects everything: there are {size} entries beside those of zeros")
        limit = threshold if count is None else kth_smallest(left, count)
        below = [i for i in kept if largest[i] < limit]
        if everything or not below or len(below) == len(kept):
            break
        kept = [i for i in kept if i not in below]
    selected = sum(int((w.detach().float().abs() < limit).sum()) for w in left)
    if not selected and count is not None:
        ties = sum(int((w.detach().float().abs() == limit).sum()) for w in left)
        raise ValueError(
            f"num_params={count} selects nothing: {ties} entries tie for the smallest, |w| = {limit:g}; accepted are "
            f"{ties} and more"
        )
    if not selected:
        least = min((float(w.detach().abs().min()) for w in left), default=0.0)
        raise ValueError(f"threshold={limit:g} selects nothing: the smallest entry of the weights is {least:g}")
    if selected == size:
        raise ValueError(
            f"threshold={limit:g} selects everything: the largest entry of the weights is {max(largest):g}"
        )
    return left, limit


def kth_smallest(weights: list[Tensor], k: int) -> float:
    """The ``k``-th smallest ``|w|`` of all, from 0, without sorting them: digits of 16 bits, the upper ones first.

    Floats that are not negative are ordered as the integers that have their bits.
    """
    found = 0
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for w in weights:
            bits = w.detach().reshape(-1).float().abs().view(torch.int32)
            if shift == 0:
                bits = bits[bits >> 16 == found >> 16]
            counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        below = counts.cumsum(0)
        digit = int((below <= k).sum())
        k -= int(below[digit - 1]) if digit else 0
        found |= digit << shift
    return float(torch.tensor(found, dtype=torch.int32).view(torch.float32))
