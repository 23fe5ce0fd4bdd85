"""Nearest code, without ever holding a distance for every pair of vector and code."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Measure = Literal["euclidean", "cosine", "dot"]

_BLOCK = 16  # codes that share a minimum in the first pass
_KEPT = 8  # blocks that are compared exactly before the whole row is
_NUMBERS = 2**24  # held at a time, at most


@torch.no_grad()
def nearest_codes(z: Tensor, codebook: Tensor, *, measure: Measure = "euclidean", chunk_size: int = 8192) -> Tensor:
    """``argmin_k |z_n - c_k|^2``, int64 ``(N,)``; on ties the lowest ``k``. That of float64, from float32's speed.

    ``|c_k|^2 - 2 z.c_k``, both less the codebook's mean, is made in float32 of ``chunk_size`` codes at a time, and of
    every 16 codes the minimum kept. The codes that share the least one are then compared in float64, with those of all
    blocks that the rounding of float32 cannot rule out. Memory is ``chunk_size + K / 16`` numbers a vector, of some
    thousand vectors at a time.

    Args:
        z: ``(N, D)``, floating point.
        codebook: ``(K, D)``.
        measure: ``euclidean``; ``cosine``, the largest ``z.c / |c|``; or ``dot``, the largest ``z.c``.

    Raises:
        ValueError: shapes that do not fit, no code, a chunk without codes.
    """
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1] or not len(codebook):
        raise ValueError(f"z {tuple(z.shape)}, codebook {tuple(codebook.shape)}: expected (N, D) and (K, D), K >= 1")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1")
    with torch.autocast(z.device.type, enabled=False):
        # float32's own values decide, so half precision is only widened; what follows is exact for these numbers.
        z, codebook = z.detach().float(), codebook.detach().float()
        if measure == "cosine":
            codebook = F.normalize(codebook, dim=1)
        elif measure == "euclidean":  # a common offset would cost the difference of large numbers its digits
            mean = codebook.mean(0)
            z, codebook = z - mean, codebook - mean
        offsets = codebook.square().sum(1) if measure == "euclidean" else codebook.new_zeros(len(codebook))
        scale = -2.0 if measure == "euclidean" else -1.0
        some = max(64, _NUMBERS // (chunk_size + len(codebook) // _BLOCK))
        return torch.cat([_search(rows, codebook, offsets, scale, chunk_size) for rows in z.split(some)])


def _search(z: Tensor, codebook: Tensor, offsets: Tensor, scale: float, chunk_size: int) -> Tensor:
    chunk = -(-chunk_size // _BLOCK) * _BLOCK
    minima, first, stride = [], [], []
    for start in range(0, len(codebook), chunk):
        d = torch.addmm(offsets[start : start + chunk], z, codebook[start : start + chunk].T, alpha=scale)
        if d.shape[1] % _BLOCK:
            d = F.pad(d, (0, -d.shape[1] % _BLOCK), value=torch.inf)
        per = d.shape[1] // _BLOCK
        # Block j of a chunk is every per-th code from j on: a minimum along rows, which is quicker than along columns.
        minima.append(d.view(len(z), _BLOCK, per).amin(1))
        first.append(torch.arange(start, start + per, device=z.device))
        stride.append(torch.full((per,), per, device=z.device))
    blocks = torch.cat(minima, 1)
    codes = torch.cat(first)[:, None] + torch.cat(stride)[:, None] * torch.arange(_BLOCK, device=z.device)
    best, at = blocks.min(1)
    found = _exact(z, codebook, scale, codes[at])
    # |fl(c^2 - 2 z.c) - exact| <= (D + 2) u (|c|^2 + 2 |z| |c|), with u = 2^-24 of float32.
    length = codebook.norm(dim=1).amax()
    bound = (z.shape[1] + 2) * 2.0**-24 * (length.square() + 2 * z.norm(dim=1) * length)
    near = blocks <= (best + 2 * bound)[:, None]
    unsure = (near.sum(1) > 1).nonzero().flatten()
    if len(unsure):
        few = unsure[near[unsure].sum(1) <= _KEPT]
        nearest = blocks[few].topk(min(_KEPT, blocks.shape[1]), dim=1, largest=False).indices
        # In their order, so that the lowest index wins a tie.
        found[few] = _exact(z[few], codebook, scale, codes[nearest].flatten(1).sort(1).values)
        many = unsure[near[unsure].sum(1) > _KEPT]
        found[many] = _in_float64(z[many], codebook, scale, chunk)
    return found


def _exact(z: Tensor, codebook: Tensor, scale: float, candidates: Tensor) -> Tensor:
    """The best of every vector's ``candidates`` ``(N, M)``, in float64; those beyond the last code do not count."""
    found = []
    for rows, some in zip(z.split(1024), candidates.split(1024), strict=True):
        codes = codebook[some.clamp(max=len(codebook) - 1)].double()
        d = scale * (codes @ rows.double()[:, :, None])[..., 0]
        if scale == -2.0:
            d += codes.square().sum(2)
        d[some >= len(codebook)] = torch.inf
        found.append(some.gather(1, d.argmin(1, keepdim=True))[:, 0])
    return torch.cat(found) if found else candidates.new_empty(0)


def _in_float64(z: Tensor, codebook: Tensor, scale: float, chunk: int) -> Tensor:
    best = z.new_full((len(z),), torch.inf, dtype=torch.float64)
    found = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for start in range(0, len(codebook), chunk):
        codes = codebook[start : start + chunk].double()
        d = scale * z.double() @ codes.T
        if scale == -2.0:
            d += codes.square().sum(1)
        value, index = d.min(1)
        better = value < best
        best, found = torch.where(better, value, best), torch.where(better, index + start, found)
    return found
