"""Bounds of nearest code inside the tiles of a matrix product, so that no matrix of scores is ever in memory."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from genkit.quantizers._exact import Codes, Measure

ROWS, CODES = 64, 64  # of a tile
_SPLITS = 64  # parts of the codebook, of each of which the two best codes are listed
_LARGEST = 48  # numbers beyond 2^48, of which products leave float32, are left to others
_NEVER = 2.0**126  # a bound's distance where there is none
_EPS = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Tiles:
    """A codebook as tensor cores search it, with digits in float16: one digit has the precision of TensorFloat32.

    With ``c'`` a code less the offset, ``operand`` ``(digits, codes, channels)`` holds ``c'`` times a power of two of
    its tile, and what rounding left, rounded again; ``square`` is ``|c'|^2``, infinite for codes that only fill a tile.
    ``of_tile`` ``(4, tiles)``: the largest ``|c'|``, the largest distance of ``c'`` from its digits, what the sums lose
    of ``|c'|^2``, and the power that undoes.
    """

    batch: ClassVar[int] = 16384

    codes: Codes
    operand: Tensor
    square: Tensor
    of_tile: Tensor
    width: int

    @classmethod
    def of(cls, codebook: Tensor, measure: Measure, digits: int) -> "Tiles":
        k, d = codebook.shape
        book = Codes.of(codebook, measure, torch.float32)
        tiles = -(-k // CODES)
        width = channels_of_a_tile(d, digits)
        operand = torch.zeros(
            digits, tiles * CODES, -(-d // width) * width, dtype=torch.float16, device=codebook.device
        )
        square = book.offset.new_full((tiles, CODES), torch.inf)
        of_tile = book.offset.new_empty(4, tiles)
        some = max(1, 2**24 // (CODES * d))
        for begin in range(0, tiles, some):
            codes = book.centred(codebook[begin * CODES : (begin + some) * CODES])
            real = len(codes)
            codes = F.pad(codes, (0, 0, 0, -real % CODES)).view(-1, CODES, d)
            here = slice(begin, begin + len(codes))
            largest, up, down = _powers(torch.linalg.vector_norm(codes, torch.inf, dim=(1, 2), keepdim=True))
            beyond = largest.logical_not_()
            codes.masked_fill_(beyond, 0).mul_(up)
            size = torch.linalg.vector_norm(codes, dim=2) * down[..., 0]
            square.view(-1)[begin * CODES : begin * CODES + real] = size.flatten()[:real].square() * book.euclidean
            pieces = operand[:, begin * CODES : (begin + len(codes)) * CODES, :d].unflatten(1, (-1, CODES))
            error = _take_digits(codes, pieces) * down[..., 0] + _EPS * size
            length = size.amax(1)
            lost = _sums(d) * book.euclidean * length.square()
            of_tile[:, here] = torch.stack(
                (length, error.amax(1), 1.001 * lost + _NEVER * beyond.flatten(), down.flatten())
            )
        if (of_tile[2] >= _NEVER).any() and not codebook.isfinite().all():
            raise ValueError("codebook: some values are not finite")
        return cls(book, operand, square, of_tile, width)

    def search(self, z: Tensor) -> Tensor:
        """Indices ``(N,)``; -1 for vectors of which the two best of a part of the codebook are not sure to suffice."""
        n, d = z.shape
        digits, _, channels = self.operand.shape
        x = (z - self.codes.offset).float()
        fits, up, down = _powers(torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True))
        x.masked_fill_(~fits, 0).mul_(up)
        size = torch.linalg.vector_norm(x, dim=1) * down[:, 0]
        blocks = -(-n // ROWS)
        operand = torch.zeros(digits, blocks * ROWS, channels, dtype=torch.float16, device=z.device)
        lost = _take_digits(x, operand[:, :n, :d]) * down[:, 0] + _EPS * size
        # |c'|^2 - 2 z'.c' is off by at most 2 (|dz| |c'| + |z'| |dc|), d- what no digit holds, and what the sums lose.
        # The norms are rounded, too.
        of_row = x.new_zeros(3, blocks * ROWS)
        of_row[:, :n] = torch.stack((2.002 * (lost + _sums(d) * size), 2.002 * size, 2 * down[:, 0]))

        tiles = self.of_tile.shape[1]
        per = -(-tiles // min(tiles, max(8, tiles // 16), _SPLITS))
        splits = -(-tiles // per)
        least = x.new_empty(2, splits, blocks * ROWS)
        listed = torch.empty_like(least, dtype=torch.int32)
        others = x.new_empty(splits, blocks * ROWS)
        with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
            _lowest[blocks, splits](
                operand, self.operand, self.square, of_row, self.of_tile, least, listed, others, blocks, tiles, per,
                DIGITS=digits, PARTS=channels // self.width, CHANNELS=self.width, ROWS=ROWS, CODES=CODES,
                **options(channels // self.width),
            )  # fmt: skip
        listed = listed.flatten(0, 1)[:, :n].clamp_(max=len(self.codes.codebook) - 1)
        unlisted = others[:, :n].amin(0).masked_fill_(~fits[:, 0], -torch.inf)
        return self.codes.decide(
            z,
            least.flatten(0, 1)[:, :n],
            lambda rows, groups: listed[groups, rows, None].long(),
            size,
            self.of_tile[0].amax(),
            len(listed),
            unlisted,
        )


def channels_of_a_tile(d: int, digits: int) -> int:
    """Vectors of more channels are read anew for every tile of codes."""
    return min(max(16, triton.next_power_of_2(d)), 256 if digits == 1 else 64)


def options(parts: int) -> dict:
    """Of a launch, for vectors in so many parts: those in one stay where they are, which takes registers."""
    return {"num_warps": 4 if parts == 1 else 8, "num_stages": 2, "enable_fp_fusion": True}


def _sums(d: int) -> float:
    """What sums of products may lose, relative to the norms: tensor cores cut off a bit a term, taken twice."""
    return 2 * (d + 16) * torch.finfo(torch.float32).eps


def _powers(largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether digits are made of such numbers; powers of two that bring them below 2^14, and back. Bits are exact."""
    exponent = ((largest.view(torch.int32) >> 23) - 126).clamp_(-_LARGEST, _LARGEST)
    up, down = (((e + 127) << 23).view(torch.float32) for e in (14 - exponent, exponent - 14))
    return largest < 2.0**_LARGEST, up, down


def _take_digits(x: Tensor, pieces: Tensor) -> Tensor:
    """Move ``x`` into digits ``(digits, ..., D)``; returns how far they are from it, and what their product misses."""
    missed = x.new_zeros(())
    for i, piece in enumerate(pieces):
        if i:  # the product of the second digits is left out, of which the other is below 2^-10 of its vector
            missed = 2.0**-10 * torch.linalg.vector_norm(x, dim=-1)
        piece.copy_(x)
        x -= piece
    return missed + torch.linalg.vector_norm(x, dim=-1)


@triton.jit(do_not_specialize=["blocks", "tiles", "per"])
def _lowest(
    z, codes, square, of_row, of_tile, least, listed, others, blocks, tiles, per,
    DIGITS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Of one block of rows and one part of the codebook, the two least lower bounds, their codes, and the next.

    Between tiles nothing crosses threads: each column of a tile keeps its least and second. Blocks of rows follow each
    other first, so that those that run together read the same codes.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    WIDTH: tl.constexpr = PARTS * CHANNELS
    n = blocks * ROWS
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CODES)
    channel = tl.arange(0, CHANNELS)
    by_length, by_error, undo = tl.load(of_row + row), tl.load(of_row + n + row), tl.load(of_row + 2 * n + row)
    z += row.to(tl.int64)[:, None] * WIDTH + channel[None, :]
    codes += column[:, None] * WIDTH + channel[None, :]
    next_z, next_code = tl.cast(n, tl.int64) * WIDTH, tl.cast(tiles, tl.int64) * CODES * WIDTH  # to the second digit
    if PARTS == 1:
        z_0 = tl.load(z)
        z_1 = tl.load(z + next_z) if DIGITS == 2 else z_0
    first = tl.full((ROWS, CODES), float("inf"), tl.float32)
    second = tl.full((ROWS, CODES), float("inf"), tl.float32)
    found = tl.zeros((ROWS, CODES), tl.int32)
    for tile in range(split * per, tl.minimum(split * per + per, tiles)):
        at = codes + tl.cast(tile, tl.int64) * CODES * WIDTH
        product = tl.zeros((ROWS, CODES), tl.float32)
        if DIGITS == 2:
            small = product  # apart: each sum is cut off at the digits of what it has come to
        for part in range(PARTS):
            if PARTS > 1:
                z_0 = tl.load(z + part * CHANNELS)
            code_0 = tl.trans(tl.load(at + part * CHANNELS))
            product = tl.dot(z_0, code_0, product)
            if DIGITS == 2:
                if PARTS > 1:
                    z_1 = tl.load(z + next_z + part * CHANNELS)
                code_1 = tl.trans(tl.load(at + next_code + part * CHANNELS))
                small = tl.dot(z_0, code_1, small)
                small = tl.dot(z_1, code_0, small)
        if DIGITS == 2:
            product += small
        length, error = tl.load(of_tile + tile), tl.load(of_tile + tiles + tile)
        lost, tile_undo = tl.load(of_tile + 2 * tiles + tile), tl.load(of_tile + 3 * tiles + tile)
        bound = by_length * length + by_error * error + lost
        low = tl.load(square + tile * CODES + column)[None, :] - bound[:, None]
        low -= (undo * tile_undo)[:, None] * product
        second = tl.minimum(second, tl.maximum(low, first))
        found = tl.where(low < first, tile, found)
        first = tl.minimum(low, first)
    place = split * n + row
    for rank in tl.static_range(2):
        value, best = tl.min(first, 1, return_indices=True)
        chosen = column[None, :] == best[:, None]
        tl.store(least + rank * tl.num_programs(1) * n + place, value)
        code = tl.sum(tl.where(chosen, found * CODES + column[None, :], 0), 1)
        tl.store(listed + rank * tl.num_programs(1) * n + place, code)
        first = tl.where(chosen, float("inf"), first)
    tl.store(others + place, tl.minimum(tl.min(first, 1), tl.min(second, 1)))
