"""Times of attention's kernels by sizes of tiles, beside those that the tables choose: for whoever amends the tables.

    python benchmarks/gpu/tiles.py
    python benchmarks/gpu/tiles.py --device cpu    the script itself, interpreted, on tiny inputs

``GENKIT_TUNE=1`` measures at run time what this measures once.
"""

import os
import sys

if any(argument.endswith("cpu") for argument in sys.argv):  # decided when kernels are defined
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator

import torch
from _measure import Row, main, seconds, sections
from torch import Tensor
from triton.runtime.errors import OutOfResources

from genkit.attention import _forward_tiles, _triton_backward, _triton_forward
from genkit.attention._tiles import Tile, split
from genkit.attention._triton_gradients import of_keys, of_queries
from genkit.attention.inputs import Options
from genkit.kernels import shared_memory

SHAPES = {"N 4096, D 64": (4, 16, 4096, 64), "N 4096, D 128": (2, 16, 4096, 128), "N 1024, D 72": (32, 16, 1024, 72)}
TINY = {"D 64": (1, 1, 32, 64)}


def timed(what: str, chosen: Tile, tiles: list[Tile], run: Callable[[Tile], object], device: str) -> Iterator[Row]:
    for tile in dict.fromkeys((chosen, *tiles)):
        name = f"{what}, {tile.rows} queries, {tile.keys} keys, {tile.warps} warps, {tile.stages} stages"
        note = "the table's" if tile == chosen else ""
        try:
            yield Row(name, seconds(lambda t=tile: run(t), device, budget=0.1) * 1e3, "ms", note=note)
        except OutOfResources:
            yield Row(name, None, "ms", note="does not fit")


def forward(name: str, six: list[Tensor], device: str) -> Iterator[Row]:
    q, k, v, *tangents = six
    options = Options(q.shape[3] ** -0.5, False)
    chosen, _ = _forward_tiles.choose(False, q.shape[3], q.shape[3], True, shared_memory(q.device))

    def run(tile: Tile) -> object:
        return _triton_forward.forward_with_tangent(q, k, v, None, None, *tangents, None, options, False, tile)

    tiles = [Tile(rows, keys, rows // 16, s) for rows in (64, 128) for keys in (32, 64, 128) for s in (2, 3)]
    yield from timed(f"{name}: value and tangent", chosen, tiles if device != "cpu" else [], run, device)


def backward(name: str, six: list[Tensor], device: str) -> Iterator[Row]:
    q, k, v, *tangents = six
    options, needs = Options(q.shape[3] ** -0.5, False), (True, True, True, False) * 2
    outputs = _triton_forward.forward_with_tangent(q, k, v, None, None, *tangents, None, options, True)
    saved = (outputs[4], outputs[5], *outputs[2:4]) if outputs[4] is not None else outputs[:4]
    inputs = (q, k, v, None, None, *tangents, None, *saved, torch.randn_like(q), torch.randn_like(q), options, needs)
    table = _triton_backward.choose(q.dtype, sum(split(q.shape[3])), True, False, shared_memory(q.device))
    kept = [(kept, passing, s) for kept in (64, 128) for passing in (16, 32, 64) for s in (1, 2)]
    kernels = (("keys", of_keys, "gradients of keys and values"), ("queries", of_queries, "gradients of queries"))
    for field, kernel, what in kernels:
        plans: dict[Tile, list] = {}

        def run(tile: Tile, field: str = field, kernel=kernel, plans: dict = plans) -> None:
            if tile not in plans:
                plan, _ = _triton_backward.launches(*inputs, table._replace(**{field: tile}))
                _triton_backward._run(plan[:1])  # sums of rows, which the others read
                plans[tile] = [launch for launch in plan if launch.kernel is kernel]
            _triton_backward._run(plans[tile])

        tiles = [Tile(y, x, x // 16, s) if field == "keys" else Tile(x, y, x // 16, s) for x, y, s in kept]
        yield from timed(f"{name}: {what}", getattr(table, field), tiles if device != "cpu" else [], run, device)


def rows(device: str) -> Iterator[Row]:
    def make(shape: tuple[int, int, int, int]) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device != "cpu" else torch.float16
        return [torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(6)]

    shapes = SHAPES if device != "cpu" else TINY
    return sections(
        (f"{name}, {part.__name__}", lambda n=name, part=part: part(n, make(shapes[n]), device))
        for part in (forward, backward)
        for name in shapes
    )


if __name__ == "__main__":
    sys.exit(main("tiles", __doc__.splitlines()[0], rows))
