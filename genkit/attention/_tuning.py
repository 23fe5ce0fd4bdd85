"""Tiles that are measured instead of looked up, where ``GENKIT_TUNE=1``.

Tiles of the forward kernels, of values and of tangents, and of the two of gradients, of keys and of queries; gradients
of a bias keep the table's. The first call, and the first backward, of each kind is slow then: of each device, dtype,
number of channels and length (up to a power of two), of what is given and what is needed.
"""

import logging
import os
from collections.abc import Callable, Hashable, Iterable

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from genkit.attention._tiles import Tile
from genkit.attention.inputs import Options
from genkit.kernels import interpreted

logger = logging.getLogger(__name__)
_fastest: dict[Hashable, Tile] = {}


def wanted() -> bool:
    """Whether tiles are to be measured: not in the interpreter, nor while a graph is recorded, which runs nothing."""
    if os.environ.get("GENKIT_TUNE", "0") != "1" or interpreted():
        return False
    return not torch.cuda.is_current_stream_capturing()


def kind(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, options: Options) -> tuple:
    """What decides which tile is the fastest: the device, sizes, lengths up to a power of two, what is a grid."""
    grids = tuple(None if x is None else x.shape[2] > 1 for x in (mask, bias))
    lengths = tuple(x.shape[2].bit_length() for x in (q, k))
    return q.device, q.dtype, q.shape[3], v.shape[3], options.is_causal, grids, lengths


def fastest(
    key: Hashable, tiles: Iterable[Tile], run: Callable[[Tile], object], measure: Callable | None = None
) -> Tile:
    """The tile with which ``run`` takes least time, measured once per ``key``; tiles that do not fit are left out.

    Raises:
        OutOfResources: none of them fits.
    """
    if key not in _fastest:
        times, refused = {}, None
        for tile in dict.fromkeys(tiles):
            try:
                times[tile] = (measure or triton.testing.do_bench)(lambda tile=tile: run(tile))
            except OutOfResources as error:
                refused = error
        if not times:
            raise refused or ValueError("no tiles to choose from")
        _fastest[key] = min(times, key=times.__getitem__)
        logger.info("%s: %s of %s takes %.3f ms", key, _fastest[key], len(times), times[_fastest[key]])
    return _fastest[key]
