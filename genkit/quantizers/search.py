"""Nearest code, without ever holding a distance for every pair of vector and code."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.registry import unknown

Measure = Literal["euclidean", "cosine", "dot"]

_BLOCK = 16  # codes that share one bound
_WIDE = 32  # channels from which on a product in bfloat16 is the quicker


@torch.no_grad()
def nearest_codes(z: Tensor, codebook: Tensor, *, measure: Measure = "euclidean", chunk_size: int = 2048) -> Tensor:
    """``argmin_k sum_d (z_nd - c_kd)^2`` as float64 computes it, int64 ``(N,)``; on ties the lowest ``k``.

    A matrix product in low precision, of ``chunk_size`` codes and some hundred vectors at a time, bounds from below the
    distance to each block of 16 codes. The block of the least bound is compared in float64, then every other whose
    bound does not exceed what was found there: nothing that could be nearest is left out. Vectors that have too many
    such blocks are searched again in the next precision: bfloat16 (on CPUs that multiply it), float32, float64. Memory
    is a copy of the codebook in that precision and ``K / 16`` numbers a vector, of some hundred vectors at a time.

    Args:
        z: ``(N, D)``, floating point. For a vector that is not finite the answer is 0.
        codebook: ``(K, D)``, floating point.
        measure: ``euclidean``; ``cosine``, the largest ``z.c / |c|``; or ``dot``, the largest ``z.c``.

    Raises:
        ValueError: shapes that do not fit, no code, a chunk without codes, an unknown measure, a code that is not
            finite.
    """
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1] or not len(codebook):
        raise ValueError(f"z {tuple(z.shape)}, codebook {tuple(codebook.shape)}: expected (N, D) and (K, D), K >= 1")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1")
    if measure not in get_args(Measure):
        raise ValueError(unknown("measure", measure, get_args(Measure)))
    z, codebook = z.detach(), codebook.detach()
    first = _distinct(codebook)
    if first is not None:
        return first[nearest_codes(z, codebook[first], measure=measure, chunk_size=chunk_size)]
    found = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    todo = z.isfinite().all(1).nonzero().flatten()
    with torch.autocast(z.device.type, enabled=False), _full_precision():
        for dtype in _precisions(z):
            if not len(todo):
                break
            table = _Table.of(codebook, measure, dtype, -(-chunk_size // _BLOCK) * _BLOCK)
            rows = todo.split(512 if z.device.type == "cpu" else 4096)
            answers = torch.cat([table.search(z[some]) for some in rows])
            found[todo] = answers
            todo = todo[answers < 0]
    return found


@dataclass(frozen=True)
class _Table:
    """A codebook as one precision searches it.

    With ``c'`` a code less the common offset, ``operand`` holds ``c'``, rounded, and ``|c'|^2``. Block j of a chunk is
    every ``stride``-th code from ``start`` on; ``length`` and ``error`` are, of each block, the largest ``|c'|`` and
    the largest distance of ``c'`` from its rounding.
    """

    codebook: Tensor
    measure: Measure
    offset: Tensor
    chunk: int
    operand: Tensor
    start: Tensor
    stride: Tensor
    length: Tensor
    error: Tensor

    @classmethod
    def of(cls, codebook: Tensor, measure: Measure, dtype: torch.dtype, chunk: int) -> "_Table":
        work = torch.promote_types(dtype, torch.float32)
        k, d = codebook.shape
        offset = codebook.new_zeros(d, dtype=work)
        if measure == "euclidean":  # any vector will do: one near the codes keeps differences of large numbers apart
            offset = codebook[:: max(1, k // 4096)].to(work).mean(0)
        parts = 0 if measure != "euclidean" else 3 if dtype == torch.bfloat16 else 1
        padded = -(-k // _BLOCK) * _BLOCK
        operand = torch.empty(padded, d + parts, dtype=dtype, device=codebook.device)
        # All that stays is made before the loop: between its temporaries it would keep their memory from being reused.
        start, stride = torch.empty(2, padded // _BLOCK, dtype=torch.int64, device=codebook.device)
        length, error = offset.new_empty(2, padded // _BLOCK)
        for begin in range(0, padded, chunk):
            part = operand[begin : begin + chunk]
            codes = codebook[begin : begin + chunk]
            if len(codes) < len(part):  # the last code again, whose index counts
                codes = torch.cat((codes, codes[-1:].expand(len(part) - len(codes), -1)))
            codes = (_scaled(codes, measure) - offset).to(work)
            part[:, :d] = codes
            square = codes.square().sum(1)
            rest = square.clone()
            for column in range(d, d + parts):  # float32's digits take three numbers of bfloat16
                part[:, column] = rest
                rest -= part[:, column]
            per = len(part) // _BLOCK
            blocks = slice(begin // _BLOCK, begin // _BLOCK + per)
            start[blocks] = torch.arange(begin, begin + per, device=codebook.device)
            stride[blocks] = per
            size = square.sqrt_()
            lost = codes.sub_(part[:, :d]).norm(dim=1) + 8 * torch.finfo(work).eps * size
            length[blocks], error[blocks] = size.view(_BLOCK, per).amax(0), lost.view(_BLOCK, per).amax(0)
        if not length.isfinite().all() and not codebook.isfinite().all():  # a length may be too large for float32
            raise ValueError("codebook: some values are not finite")
        return cls(codebook, measure, offset, chunk, operand, start, stride, length, error)

    def search(self, z: Tensor) -> Tensor:
        """Indices ``(N,)``; -1 for vectors that are not sure in this precision."""
        n, d = z.shape
        dtype, work = self.operand.dtype, self.offset.dtype
        centred = (z - self.offset).to(work)
        factor = torch.ones(n, self.operand.shape[1], dtype=dtype, device=z.device)
        factor[:, :d] = -2 * centred  # doubling is exact
        factor = factor.T.contiguous()
        least = torch.empty(len(self.start), n, dtype=work, device=z.device)
        buffer = torch.empty(min(self.chunk, len(self.operand)), n, dtype=dtype, device=z.device)
        for begin in range(0, len(self.operand), self.chunk):
            part = self.operand[begin : begin + self.chunk]
            product = torch.mm(part, factor, out=buffer[: len(part)])
            blocks = slice(begin // _BLOCK, begin // _BLOCK + len(part) // _BLOCK)
            least[blocks] = product.view(_BLOCK, -1, n).amin(0)

        # |c'|^2 - 2 z'.c' is off by at most 2 (|dz| |c'| + |z'| |dc|), d- what rounding took away, and what the sums
        # lose: at most D + 4 roundings of float32 (or float64), taken here four times.
        size = centred.norm(dim=1)
        lost = (centred + factor[:d].T.to(work) / 2).norm(dim=1) + 8 * torch.finfo(work).eps * size
        sums = 2 * (d + 16) * torch.finfo(work).eps
        if dtype != work:  # the product itself was rounded
            least -= torch.finfo(dtype).eps / 2 * (1 + 2**-7) * least.abs()
        euclidean = self.measure == "euclidean"
        of_block = torch.stack((self.length, self.error, self.length.square()), 1)
        of_row = torch.stack((2 * lost + 2 * sums * size, 2 * size, torch.full_like(size, sums * euclidean)))
        least.addmm_(of_block, of_row, alpha=-1.001)  # the norms are rounded, too

        rows = torch.arange(n, device=z.device)
        nearest = least.argmin(0)
        value, index = self._exactly(z, rows, nearest)
        known = value
        if euclidean:
            square = (z.double() - self.offset).square().sum(1)
            known = value - square + 2.0**-44 * (value + square)
        tiny = torch.finfo(work).tiny * 2**20 * (1 + size + self.length.amax())
        known = (known + 2.0**-21 * known.abs() + tiny).to(work)
        least[nearest, rows] = torch.inf
        near = (least > known).logical_not_()  # what is not a number counts as near
        most = len(near) if dtype == torch.float64 else max(4, len(near) // 256)
        unsure = torch.zeros(n, dtype=torch.bool, device=z.device)
        if int(near.count_nonzero()) > most * n:  # too many to list
            unsure = near.sum(0) > most
            near[:, unsure] = False
        others, owners = near.nonzero().unbind(1)
        if len(owners):
            unsure |= owners.bincount(minlength=n) > most
            others, owners = others[~unsure[owners]], owners[~unsure[owners]]
            further, candidates = self._exactly(z, owners, others)
            best = value.scatter_reduce(0, owners, further, "amin")
            index = torch.where(value == best, index, len(self.codebook))
            tied = further == best[owners]
            index = index.scatter_reduce(0, owners[tied], candidates[tied], "amin")
        return index.masked_fill(unsure, -1)

    def _exactly(self, z: Tensor, rows: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The least value and its lowest code, in float64, of block ``blocks[i]`` for vector ``rows[i]``."""
        values, found = [], []
        some = max(1, 2**20 // (_BLOCK * z.shape[1]))
        within = torch.arange(_BLOCK, device=z.device)
        for row, block in zip(rows.split(some), blocks.split(some), strict=True):
            members = self.start[block, None] + self.stride[block, None] * within
            members.clamp_(max=len(self.codebook) - 1)
            codes, x = _scaled(self.codebook[members], self.measure).double(), z[row, None].double()
            d = (x - codes).square_().sum(2) if self.measure == "euclidean" else -2 * (x * codes).sum(2)
            at = d.argmin(1, keepdim=True)
            values.append(d.gather(1, at)[:, 0])
            found.append(members.gather(1, at)[:, 0])
        return torch.cat(values), torch.cat(found)


def _scaled(codes: Tensor, measure: Measure) -> Tensor:
    return F.normalize(codes.double(), dim=-1) if measure == "cosine" else codes


def _distinct(codebook: Tensor) -> Tensor | None:
    """The first of each distinct code, in order, if hardly any are: they would all be near, if one is."""
    k = len(codebook)
    sample = codebook[torch.arange(min(k, 256), device=codebook.device) * 7919 % k]
    if k <= _BLOCK or 2 * len(sample.unique(dim=0)) > len(sample):
        return None
    inverse = codebook.unique(dim=0, return_inverse=True)[1]
    distinct = int(inverse.max()) + 1
    if 2 * distinct > k:
        return None
    first = torch.full((distinct,), k, device=codebook.device)
    first.scatter_reduce_(0, inverse, torch.arange(k, device=codebook.device), "amin")
    return first.sort().values


def _precisions(z: Tensor) -> list[torch.dtype]:
    quick = [torch.bfloat16] if z.device.type == "cpu" and z.shape[1] >= _WIDE and _multiplies_bfloat16() else []
    return [*quick, torch.float32, torch.float64]


def _multiplies_bfloat16() -> bool:
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products in float32 without TensorFloat32 or bfloat16 within, whatever the process has chosen."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    chosen = [b.fp32_precision for b in backends]
    try:
        for b in backends:
            b.fp32_precision = "ieee"
        yield
    finally:
        for b, precision in zip(backends, chosen, strict=True):
            b.fp32_precision = precision
