"""Nearest code, without ever holding a distance for every pair of vector and code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from genkit.kernels import fused
from genkit.quantizers._exact import Codes, Measure
from genkit.registry import unknown

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
    On GPUs with Triton (see :mod:`genkit.kernels`) a kernel goes first, which keeps the bounds of the two best codes of
    each of up to 64 parts of the codebook, and of all others: the answer is the same.

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
        for make in _tables(z, codebook, measure, chunk_size):
            if not len(todo):
                break
            table = make()
            answers = torch.cat([table.search(z[some]) for some in todo.split(table.batch)])
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

    codes: Codes
    chunk: int
    operand: Tensor
    start: Tensor
    stride: Tensor
    length: Tensor
    error: Tensor

    @property
    def batch(self) -> int:
        """Vectors of one search."""
        return 512 if self.operand.device.type == "cpu" else 4096

    @classmethod
    def of(cls, codebook: Tensor, measure: Measure, dtype: torch.dtype, chunk: int) -> "_Table":
        work = torch.promote_types(dtype, torch.float32)
        k, d = codebook.shape
        book = Codes.of(codebook, measure, work)
        parts = 0 if not book.euclidean else 3 if dtype == torch.bfloat16 else 1
        padded = -(-k // _BLOCK) * _BLOCK
        operand = torch.empty(padded, d + parts, dtype=dtype, device=codebook.device)
        # All that stays is made before the loop: between its temporaries it would keep their memory from being reused.
        start, stride = torch.empty(2, padded // _BLOCK, dtype=torch.int64, device=codebook.device)
        length, error = book.offset.new_empty(2, padded // _BLOCK)
        for begin in range(0, padded, chunk):
            part = operand[begin : begin + chunk]
            codes = codebook[begin : begin + chunk]
            if len(codes) < len(part):  # the last code again, whose index counts
                codes = torch.cat((codes, codes[-1:].expand(len(part) - len(codes), -1)))
            codes = book.centred(codes)
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
        return cls(book, chunk, operand, start, stride, length, error)

    def search(self, z: Tensor) -> Tensor:
        """Indices ``(N,)``; -1 for vectors that are not sure in this precision."""
        n, d = z.shape
        dtype, work = self.operand.dtype, self.length.dtype
        centred = (z - self.codes.offset).to(work)
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
        of_block = torch.stack((self.length, self.error, self.length.square()), 1)
        of_row = torch.stack((2 * lost + 2 * sums * size, 2 * size, torch.full_like(size, sums * self.codes.euclidean)))
        least.addmm_(of_block, of_row, alpha=-1.001)  # the norms are rounded, too
        most = len(least) if dtype == torch.float64 else max(4, len(least) // 256)
        return self.codes.decide(z, least, self._members, size, self.length.amax(), most)

    def _members(self, rows: Tensor, blocks: Tensor) -> Tensor:
        within = torch.arange(_BLOCK, device=rows.device)
        members = self.start[blocks, None] + self.stride[blocks, None] * within
        return members.clamp_(max=len(self.codes.codebook) - 1)


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


def _tables(z: Tensor, codebook: Tensor, measure: Measure, chunk_size: int) -> Iterator[Callable]:
    """What makes the codebook's form for each search, the quickest first; the last leaves no vector unsure."""
    if fused(z.device):
        from genkit.quantizers._triton_search import Tiles

        for digits in (2,) if z.shape[1] <= _WIDE else (1, 2):
            yield partial(Tiles.of, codebook, measure, digits)
    for dtype in _precisions(z):
        yield partial(_Table.of, codebook, measure, dtype, -(-chunk_size // _BLOCK) * _BLOCK)


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
