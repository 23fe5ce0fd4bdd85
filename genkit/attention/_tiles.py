"""What the kernels of attention share: tensors as kernels see them, tiles of them, masks, rounding and dots.

A tensor is a tuple of its pointer and strides, so that one argument of a kernel is one tensor and an absent one is
``None``, of which nothing is compiled. Channels that are no power of two are two tiles: 72 are 64 + 16, not 128.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkit.kernels import interpreted

# In Triton's interpreter numbers in bfloat16 are float32 rounded by hand: its own casts truncate, its dots are garbage.
INTERPRETED: tl.constexpr = tl.constexpr(interpreted())
PRECISION: tl.constexpr = tl.constexpr("tf32x3")  # of float32: three dots, 21 bits
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """Queries and keys of one step, and how the compiler spreads it."""

    rows: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict:
        """Launch options; multiplications and additions are fused, which Triton 3.10 no longer does unasked."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# ---- on the host ----


def split(channels: int) -> tuple[int, int]:
    """Two powers of two, of at least 16 or 0, that hold ``channels`` with least padding: 72 -> (64, 16)."""
    low = 1 << (channels.bit_length() - 1)
    if low == channels:
        return low, 0
    high = max(16, 1 << (channels - low - 1).bit_length())
    return (2 * low, 0) if high >= low else (low, high)


def unit_stride(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each tensor, as memory has it: copied where neighbouring channels are not neighbours, or zeros have no memory."""
    there = [in_memory(x) for x in tensors]
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in there]


def in_memory(x: Tensor | None) -> Tensor | None:
    """What kernels can read: forward mode makes tangents known to be 0 without memory, and negates without a pass."""
    if x is not None and x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return x if x is None else x.resolve_neg()


def unit(*tensors: Tensor | None) -> int:
    """What strides are counted in: 8 where all are multiples of it, so that the compiler knows vectors are aligned."""
    strides = (s for x in tensors if x is not None for s in x.stride()[:-1])
    return 8 if all(s % 8 == 0 for s in strides) else 1


def view(x: Tensor | None, unit: int = 1) -> tuple | None:
    """``(pointer, batch stride, head stride, row stride)`` of ``(B, H, rows, channels)``, or of ``(B, H, rows)``."""
    return None if x is None else (x, *(s // unit for s in x.stride()[:3]))


def grid_view(x: Tensor | None) -> tuple | None:
    """``(pointer, batch, head, row, key stride, rows, far)`` of a mask or bias; strides are 0 where it is broadcast.

    What is compiled for: ``rows``, whether it has some and is no vector of keys; ``far``, whether offsets in a head
    exceed 32 bits. No ``None`` can say so: Triton 3.6 compares no tuple with ``None`` that has one.
    """
    if x is None:
        return None
    b, h, m, n = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    far = (x.shape[2] - 1) * m + (x.shape[3] - 1) * n >= 2**31
    return (x.view(torch.uint8) if x.dtype == torch.bool else x), b, h, m, n, tl.constexpr(m != 0), tl.constexpr(far)


def rows_like(q: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Empty ``(B, H, M, channels)``, in memory ``(B, M, H, channels)``, so that merging heads copies nothing."""
    b, h, m, _ = q.shape
    return q.new_empty(b, m, h, channels, dtype=dtype).transpose(1, 2)


def launching(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device, which this makes ``x``'s."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---- in kernels ----


@triton.jit
def head(x, batch, index, UNIT: tl.constexpr):
    """Where a head of a tensor begins; offsets may exceed 32 bits."""
    return x[0] + (batch.to(tl.int64) * x[1] + index.to(tl.int64) * x[2]) * UNIT


@triton.jit
def part(
    begin, stride, start, size, ROWS: tl.constexpr, WHOLE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """``(ROWS, WIDTH)`` from row ``start`` and channel ``FIRST``; 0 beyond ``size`` rows and ``CHANNELS``."""
    row = tl.arange(0, ROWS)[:, None]
    channel = FIRST + tl.arange(0, WIDTH)[None, :]
    at = begin + tl.cast(start, tl.int64) * stride + (row * stride + channel)
    if FIRST + WIDTH > CHANNELS:
        if WHOLE:
            x = tl.load(at, mask=channel < CHANNELS, other=0.0)
        else:
            x = tl.load(at, mask=(row < size - start) & (channel < CHANNELS), other=0.0)
    elif WHOLE:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=row < size - start, other=0.0)
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@triton.jit
def load(
    begin, stride, start, size, ROWS: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr,
):  # fmt: skip
    """Rows ``start ...`` of a head as two tiles, ``(ROWS, LOW)`` and ``(ROWS, HIGH)``; the second is idle if HIGH = 0.

    ``begin`` is from :func:`head` and ``stride`` in elements: ``x[3] * UNIT``. WHOLE promises that all rows exist.
    """
    low = part(begin, stride, start, size, ROWS, WHOLE, 0, LOW, CHANNELS)
    high = low
    if HIGH > 0:
        high = part(begin, stride, start, size, ROWS, WHOLE, LOW, HIGH, CHANNELS)
    return low, high


@triton.jit
def store(
    begin, stride, start, size, low, high, ROWS: tl.constexpr, CHANNELS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr,
):  # fmt: skip
    """What :func:`load` reads, rounded to the pointer's type."""
    row = tl.arange(0, ROWS)[:, None]
    at = begin + tl.cast(start, tl.int64) * stride + row * stride
    channel = tl.arange(0, LOW)[None, :]
    tl.store(at + channel, rounded(low, begin.dtype.element_ty), mask=(row < size - start) & (channel < CHANNELS))
    if HIGH > 0:
        channel = LOW + tl.arange(0, HIGH)[None, :]
        tl.store(at + channel, rounded(high, begin.dtype.element_ty), mask=(row < size - start) & (channel < CHANNELS))


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """float32 ``x`` as an operand of a dot with tiles that were loaded in TYPE, rounded to nearest even."""
    if INTERPRETED and TYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x != x, x, bits.to(tl.float32, bitcast=True))
    else:
        x = x.to(TYPE)
    return x


@triton.jit
def rounded_sum(x, TYPE: tl.constexpr):
    """:func:`rounded` and the sums of its rows in float32."""
    if (
        not INTERPRETED and TYPE == tl.bfloat16
    ):  # the compiler rounds one number at a time where the result is used twice
        short, long = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=&r,=&r,=r,r,r",
            [x],
            dtype=(tl.bfloat16, tl.float32),
            is_pure=True,
            pack=2,
        )
    else:
        short = rounded(x, TYPE)
        long = short.to(tl.float32)
    return short, tl.sum(long, 1)


@triton.jit
def dot(a, b, total):
    """``total + a b`` in float32."""
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def scores(a_low, a_high, b_low, b_high, total, HIGH: tl.constexpr):
    """``total + a b^T`` over all channels."""
    total = dot(a_low, tl.trans(b_low), total)
    if HIGH > 0:
        total = dot(a_high, tl.trans(b_high), total)
    return total


@triton.jit
def grid(x, batch, index, row, key, M, N):
    """Entries of a mask or bias at ``row`` and ``key``, index tensors of which the shapes broadcast; 0 outside.

    Shape: theirs, without the rows' extent where all rows have the same entries.
    """
    at = x[0] + batch.to(tl.int64) * x[1] + index.to(tl.int64) * x[2]
    inside = key < N
    if x[6]:
        row, key = row.to(tl.int64), key.to(tl.int64)
    if x[5]:
        at = at + (row * x[3] + key * x[4])
        inside = inside & (row < M)
    else:
        at = at + key * x[4]
    return tl.load(at, mask=inside, other=0)


@triton.jit
def attended(mask, batch, index, row, key, M, N, CAUSAL: tl.constexpr, WHOLE: tl.constexpr):
    """Whether the query at ``row`` sees ``key``; WHOLE promises that all keys exist."""
    if mask is not None:
        seen = grid(mask, batch, index, row, key, M, N) != 0
        if CAUSAL:
            seen = seen & (key <= row)
    elif CAUSAL:
        seen = key <= row
        if not WHOLE:
            seen = seen & (key < N)
    else:
        seen = key < N
    return seen


@triton.jit
def place(TILES, HEADS, GROUP, LAST_FIRST: tl.constexpr):
    """``(tile, batch, head of q, head of k)`` of this program of ``B * HEADS * TILES``; neighbours share keys.

    LAST_FIRST begins with the last tile, which under a causal mask has most to do.
    """
    program = tl.program_id(0)
    tile = program % TILES
    if LAST_FIRST:
        tile = TILES - 1 - tile
    rest = program // TILES
    index = rest % HEADS
    return tile, rest // HEADS, index, index // GROUP
