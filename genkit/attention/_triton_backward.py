"""Launches of the gradients of attention and of its tangent: nothing quadratic in memory, the same bytes every time."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genkit.attention import _tiles, _tuning
from genkit.attention._tiles import Tile
from genkit.attention._triton_gradients import of_bias, of_keys, of_queries, row_sums
from genkit.attention.inputs import Options
from genkit.kernels import shared_memory


class Launch(NamedTuple):
    """A kernel, how many programs of it, and what it is launched with."""

    kernel: Any
    programs: int
    arguments: dict
    options: dict


class Tiles(NamedTuple):
    """A tile for each kernel."""

    keys: Tile
    queries: Tile
    bias: Tile


def backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, o: Tensor, lse: Tensor, g: Tensor,
    options: Options, needs: tuple[bool, ...], tiles: Tiles | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``(dq, dk, dv, dbias)`` for the gradient ``g`` of ``o``; ``dbias`` in the bias' own shape; as many ``needs``."""
    no = (None,) * 4
    needs = (*needs, *(False,) * 4)
    return _gradients(q, k, v, bias, mask, *no, o, None, lse, None, g, None, options, needs, tiles)[:4]


def backward_with_tangent(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, tbias: Tensor | None,
    o: Tensor, to: Tensor, lse: Tensor, mu: Tensor, g: Tensor | None, h: Tensor,
    options: Options, needs: tuple[bool, ...], tiles: Tiles | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``(dq, dk, dv, dbias, dtq, dtk, dtv, dtbias)`` for the gradients ``g`` of ``o`` and ``h`` of ``to``.

    Those that ``needs``, in this order, does not ask for are ``None`` and cost nothing.

    ``o`` and ``to`` may be in float32: in bfloat16 they cost an error of 5e-2 and more in ``dq`` where values share an
    offset, because gradients of scores are differences to ``h . o`` and ``h . to``.
    """
    return _gradients(q, k, v, bias, mask, tq, tk, tv, tbias, o, to, lse, mu, g, h, options, needs, tiles)


def launches(
    q, k, v, bias, mask, tq, tk, tv, tbias, o, to, lse, mu, g, h, options: Options, needs: tuple[bool, ...],
    tiles: Tiles | None = None,
) -> tuple[list[Launch], tuple]:  # fmt: skip
    """What computes the gradients, in order, and the eight of them, ``None`` where none is needed."""
    b, heads, m, d = q.shape
    shared, n, values = v.shape[1:]
    q, k, v, tq, tk, tv, o, to, g, h = _tiles.unit_stride(q, k, v, tq, tk, tv, o, to, g, h)
    bias, tbias = _tiles.in_memory(bias), _tiles.in_memory(tbias)
    moves = tq is not None or tk is not None or tbias is not None
    lse, mu = lse.contiguous(), mu.contiguous() if moves else None
    om = torch.empty_like(lse) if moves else None
    dl = torch.empty_like(lse)
    x_and_needs = zip((q, k, v, tq, tk, tv), needs[:3] + needs[4:7], strict=True)
    dq, dk, dv, dtq, dtk, dtv = (_tiles.rows_like(x, x.shape[3], x.dtype) if n else None for x, n in x_and_needs)
    dbias, dtbias = (x.new_empty(x.shape) if n else None for x, n in ((bias, needs[3]), (tbias, needs[7])))

    rows, given = dict(o=o, to=to, g=g, h=h), dict(q=q, k=k, v=v, tq=tq, tk=tk, tv=tv, g=g, h=h)
    of = dict(dk=dk, dv=dv, dtk=dtk, dtv=dtv, dq=dq, dtq=dtq)
    unit = _tiles.unit(*rows.values(), *given.values(), *of.values())
    sums = {name: _tiles.view(x) for name, x in dict(om=om, dl=dl).items()}
    (d_low, d_high), (v_low, v_high) = _tiles.split(d), _tiles.split(values)
    channels = dict(UNIT=unit, DV=values, DV_LOW=v_low, DV_HIGH=v_high)
    common = {
        **{name: _tiles.view(x, unit) for name, x in given.items()},
        **{name: _tiles.view(x) for name, x in dict(lse=lse, mu=mu).items()},
        **sums,
        **{name: _tiles.grid_view(x) for name, x in dict(mask=mask, bias=bias, tbias=tbias).items()},
        **dict(M=m, N=n, GROUP=heads // shared, scale=options.scale, CAUSAL=options.is_causal),
        **dict(D=d, D_LOW=d_low, D_HIGH=d_high, **channels),
    }
    width = max(d_low + d_high, v_low + v_high)
    tiles = tiles or choose(q.dtype, width, h is not None, bias is not None, shared_memory(q.device))

    def launch(kernel, programs: int, tile: Tile, **more) -> Launch:
        return Launch(kernel, programs, {**common, **more, "ROWS": tile.rows, "KEYS": tile.keys}, tile.options())

    arguments = {**{name: _tiles.view(x, unit) for name, x in rows.items()}, **sums, **channels}
    plan = [Launch(row_sums, _over(m, 32) * b * heads, {**arguments, "M": m, "HEADS": heads, "ROWS": 32}, {})]
    for names in _together(q.dtype, width, h is not None):
        outputs = {name: _tiles.view(of[name], unit) if name in names else None for name in ("dk", "dv", "dtk", "dtv")}
        if any(outputs.values()):
            plan.append(launch(of_keys, _over(n, tiles.keys.keys) * b * shared, tiles.keys, HEADS=shared, **outputs))
    outputs = {name: _tiles.view(of[name], unit) for name in ("dq", "dtq")}
    if any(outputs.values()):
        programs = _over(m, tiles.queries.rows) * b * heads
        plan.append(launch(of_queries, programs, tiles.queries, HEADS=heads, **outputs))
    outputs = {name: _tiles.grid_view(x) for name, x in dict(dbias=dbias, dtbias=dtbias).items()}
    if any(outputs.values()):
        programs, axes = _axes(bias, b, heads, m, n, tiles.bias)
        plan.append(launch(of_bias, programs, tiles.bias, **axes, **outputs))
    return plan, (dq, dk, dv, dbias, dtq, dtk, dtv, dtbias)


# Up to so many channels, tiles of which sums stay in registers, as seen by compiling. A tile of keys is kept and the
# queries pass, or the other way round; Hopper's products take 64 of what is kept for every 4 warps.
_HOPPER = {
    64: Tiles(Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 1)),
    128: Tiles(Tile(32, 128, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 4, 1)),
    256: Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 32, 4, 2)),  # its dots would wait for each other
}
_HOPPER_WITHOUT_TANGENT = {
    128: Tiles(Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 1)),
    256: Tiles(Tile(32, 64, 8, 2), Tile(64, 32, 8, 2), Tile(16, 32, 4, 2)),
}
_OTHERS = {
    64: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(16, 32, 4, 2)),
    96: Tiles(Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),  # two parts, as of 72 channels
    128: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
    256: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 2)),
}
_OTHERS_WITH_BIAS = {128: Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)), 256: _OTHERS[256]}
_OTHERS_WITHOUT_TANGENT = {
    64: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(16, 32, 4, 2)),
    128: Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(16, 32, 4, 2)),
    256: Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
}
_IN_FLOAT32 = {
    64: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 2)),
    256: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 2)),
}


def choose(dtype: torch.dtype, width: int, with_tangent: bool, biased: bool, shared: int) -> Tiles:
    """Tiles for ``width`` channels of ``dtype`` where a block has ``shared`` bytes of shared memory."""
    if dtype == torch.float32:
        table = _IN_FLOAT32
    elif shared > 200 * 1024:
        table = _HOPPER if with_tangent else _HOPPER_WITHOUT_TANGENT
    elif with_tangent:
        table = _OTHERS_WITH_BIAS if biased else _OTHERS
    else:
        table = _OTHERS_WITHOUT_TANGENT
    token = width * dtype.itemsize * (4 if with_tangent else 2) * 9 // 8  # bytes, with what is exchanged
    fitting = []
    for rows, keys, warps, stages in next(table[most] for most in table if width <= most):
        while (rows + keys) * token > shared and max(rows, keys) > 16:
            rows, keys, warps = (rows // 2, keys, 4) if rows > keys else (rows, keys // 2, 4)
        fitting.append(Tile(rows, keys, warps, stages))
    return Tiles(*fitting)


def _together(dtype: torch.dtype, width: int, with_tangent: bool) -> tuple[tuple[str, ...], ...]:
    """Which gradients of keys are computed in one pass: as many as registers hold sums of."""
    if not with_tangent or width <= 64:
        return (("dk", "dv", "dtk", "dtv"),)
    if width <= 128 and dtype != torch.float32:
        return ("dk", "dtk"), ("dv", "dtv")
    return ("dk", "dtk"), ("dv",), ("dtv",)


def _axes(bias: Tensor, b: int, heads: int, m: int, n: int, tile: Tile) -> tuple[int, dict]:
    """How many programs the bias' own tiles have, and how many of each axis one sums over."""
    row_tiles, key_tiles = _over(m, tile.rows), _over(n, tile.keys)
    own, sums = [], []
    for size, full in zip(bias.shape, (b, heads, row_tiles, key_tiles), strict=True):
        own.append(1 if size == 1 else full)
        sums.append(full if size == 1 else 1)
    steps = dict(zip(("BATCHES", "HEADS", "ROW_STEPS", "KEY_STEPS"), sums, strict=True))
    owns = dict(zip(("OWN_HEADS", "OWN_ROWS", "OWN_KEYS"), own[1:], strict=True))
    return math.prod(own), {**owns, **steps, "ONE_ROW": bias.shape[2] == 1, "ONE_KEY": bias.shape[3] == 1}


def _over(size: int, tile: int) -> int:
    return -(-size // tile)


def _gradients(*every) -> tuple:
    *inputs, tiles = every
    with _tiles.launching(inputs[0]):
        if tiles is None and _tuning.wanted():
            tiles = _fastest(*inputs)
        plan, gradients = launches(*[*inputs, tiles])
        _run(plan)
    return gradients


def _run(plan: list[Launch]) -> None:
    for kernel, programs, arguments, options in plan:
        if programs:
            kernel[(programs,)](**arguments, **options)


def _fastest(q, k, v, bias, mask, tq, tk, tv, tbias, o, to, lse, mu, g, h, options, needs) -> Tiles:
    """Tiles of keys and of queries that are measured, one after the other."""
    inputs = (q, k, v, bias, mask, tq, tk, tv, tbias, o, to, lse, mu, g, h, options, needs)
    present = tuple(x is not None for x in (tq, tk, tv, tbias, g, h))
    key = (*_tuning.kind(q, k, v, bias, mask, options), present, needs)
    width = max(sum(_tiles.split(x.shape[3])) for x in (q, v))
    tiles = choose(q.dtype, width, h is not None, bias is not None, shared_memory(q.device))
    there = {launch.kernel for launch in launches(*inputs, tiles)[0]}
    for name, kernel in (("keys", of_keys), ("queries", of_queries)):
        if kernel not in there:
            continue
        plans: dict[Tile, list[Launch]] = {}

        def run(tile: Tile, tiles=tiles, name=name, kernel=kernel, plans=plans) -> None:
            if tile not in plans:
                plan, _ = launches(*inputs, tiles._replace(**{name: tile}))
                _run(plan[:1])  # sums of rows, which the others read
                plans[tile] = [launch for launch in plan if launch.kernel is kernel]
            _run(plans[tile])

        kept = [(kept, passing, stages) for kept in (64, 128) for passing in (16, 32, 64) for stages in (1, 2)]
        others = [Tile(y, x, x // 16, s) if name == "keys" else Tile(x, y, x // 16, s) for x, y, s in kept]
        best = _tuning.fastest((*key, name), (getattr(tiles, name), *others), run)
        tiles = tiles._replace(**{name: best})
    return tiles
