"""Sizes of tiles of the forward kernels, by what the compiler makes of them; their speed is not measured."""

from genkit.attention._tiles import Tile


def choose(wide: bool, d: int, dv: int, with_tangent: bool, shared: int) -> tuple[Tile, int]:
    """The tile, and how many channels of ``v`` are summed at once. ``wide``: float32; ``shared``: bytes of a block.

    Registers decide: two sums over many channels leave none for the scores, which are then computed for each part of
    ``v``. Of what was tried, the compiler spills least with these, or little (tests/attention/test_triton_compiles.py).
    """
    most = max(d, dv)
    rows = _TABLE[wide, with_tangent, shared >= 227 * 1024]
    tile, part = rows[0 if most <= 64 else 1 if most <= 80 else 2 if most <= 128 else 3]
    return Tile(*tile), part


# (float32, with tangent, 227 KiB of shared memory rather than 99): for up to 64, 80, 128 and 256 channels
_TABLE: dict = {
    (False, False, True): (
        ((128, 128, 8, 2), 256), ((128, 128, 8, 2), 256), ((128, 128, 8, 2), 256), ((128, 64, 8, 2), 256),
    ),
    (False, False, False): (
        ((128, 64, 8, 3), 256), ((128, 64, 8, 3), 256), ((128, 64, 8, 2), 256), ((64, 32, 4, 2), 256),
    ),
    (False, True, True): (
        ((128, 64, 8, 3), 256), ((128, 64, 8, 2), 256), ((128, 64, 8, 2), 256), ((128, 32, 8, 2), 128),
    ),
    (False, True, False): (
        ((128, 64, 8, 2), 256), ((128, 64, 8, 2), 256), ((128, 32, 8, 2), 256), ((64, 16, 4, 2), 64),
    ),
    (True, False, True): (
        ((64, 32, 4, 2), 256), ((64, 32, 4, 2), 256), ((64, 32, 4, 2), 256), ((64, 16, 4, 1), 256),
    ),
    (True, False, False): (
        ((64, 32, 4, 2), 256), ((64, 16, 4, 2), 256), ((32, 16, 2, 1), 256), ((32, 16, 2, 1), 64),
    ),
    (True, True, True): (
        ((64, 32, 4, 1), 256), ((64, 16, 4, 1), 64), ((64, 16, 4, 1), 64), ((16, 16, 1, 1), 64),
    ),
    (True, True, False): (
        ((64, 16, 4, 2), 256), ((16, 16, 1, 1), 64), ((16, 16, 1, 1), 64), ((16, 16, 1, 1), 64),
    ),
}  # fmt: skip

# what is measured beside the table's where tiles are measured
OTHERS = [Tile(rows, keys, rows // 16, stages) for rows in (64, 128) for keys in (32, 64, 128) for stages in (2, 3)]
