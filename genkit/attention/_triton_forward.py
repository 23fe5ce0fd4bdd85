"""Values and tangents of attention in one pass over the keys, on tiles.

With ``e = exp(s - m)`` rounded to the operands' type, and ``h`` the rounded ``e * (t - c)``, sums over the keys of
``e``, ``h``, ``e v`` and ``e tv + h v`` give ``o``, ``mu`` and ``to``. Any ``c`` is right, for rows of ``p * (t - mu)``
sum to 0; one near ``mu`` keeps small what cancels, and dividing by sums of what was *rounded* makes what a common
offset of ``v`` adds cancel exactly. Where ``lse`` is known it takes the place of the running maximum ``m``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genkit.attention import _tiles, _tuning
from genkit.attention._forward_tiles import OTHERS, choose
from genkit.attention._tiles import (
    LN2,
    LOG2E,
    Tile,
    attended,
    dot,
    grid,
    head,
    load,
    place,
    rounded,
    rounded_sum,
    scores,
    store,
)
from genkit.attention.inputs import Options
from genkit.kernels import interpreted, shared_memory

# Where lse is known, e = 2^6 p: in float16 fewer of the small ones are subnormal. It cancels.
LIFT: tl.constexpr = tl.constexpr(6.0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    options: Options,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """``(o, lse)``; ``lse`` is the natural logarithm of the sum of ``exp`` of scores, in float32."""
    o, _, lse, _, _, _ = _launch(q, k, v, bias, mask, None, None, None, None, None, options, False, False, tile)
    return o, lse  # type: ignore[return-value]


def tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    tbias: Tensor | None,
    options: Options,
    precise: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(to, mu, o, to)``, the last two in float32 if ``precise``; ``to`` not again where it is in float32 already."""
    _, to, _, mu, o, exact = _launch(q, k, v, bias, mask, lse, tq, tk, tv, tbias, options, True, precise, tile)
    return to, mu, o, exact  # type: ignore[return-value]


def forward_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    tbias: Tensor | None,
    options: Options,
    precise: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(o, to, lse, mu, o, to)``, the last two in float32 if ``precise`` and nothing else already is."""
    return _launch(q, k, v, bias, mask, None, tq, tk, tv, tbias, options, True, precise, tile)  # type: ignore[return-value]


def launches(
    q, k, v, bias, mask, lse, tq, tk, tv, tbias, options: Options, with_tangent: bool, precise: bool,
    tile: Tile | None, shared: int,
) -> tuple[list[dict], Tile, tuple]:  # fmt: skip
    """Arguments of each launch, their tile, and what they fill: ``(o, to, lse, mu, o, to)``, absent ones ``None``."""
    b, h, m, d = q.shape
    n, dv = v.shape[2:]
    given = lse is not None
    scale = options.scale
    if scale <= 0:  # the kernel takes the maximum before it scales
        q, tq = (x if x is None else x * (-1 if scale else 0) for x in (q, tq))
        scale = -scale or 1.0
    q, k, v, tq, tk, tv = _tiles.unit_stride(q, k, v, tq, tk, tv)
    bias, tbias = _tiles.in_memory(bias), _tiles.in_memory(tbias)
    wide = q.dtype == torch.float32
    o = None if given else _tiles.rows_like(q, dv, q.dtype)
    to = _tiles.rows_like(q, dv, q.dtype) if with_tangent else None
    mu = q.new_empty(b, h, m, dtype=torch.float32) if with_tangent else None
    o_exact = _tiles.rows_like(q, dv, torch.float32) if precise and (given or not wide) else None
    to_exact = _tiles.rows_like(q, dv, torch.float32) if precise and not wide else None
    lse = lse.contiguous() if given else q.new_empty(b, h, m, dtype=torch.float32)
    moves = tq is not None or tk is not None or tbias is not None
    of_keys, of_values = dict(q=q, k=k, tq=tq, tk=tk), dict(v=v, tv=tv, o=o, to=to, o_exact=o_exact, to_exact=to_exact)
    unit = _tiles.unit(*of_keys.values(), *of_values.values())
    chosen, width = choose(wide, d, dv, with_tangent, shared)
    grids = {name: _tiles.grid_view(x) for name, x in dict(mask=mask, bias=bias, tbias=tbias).items()}
    if any(x is not None and x[5] for x in grids.values()):  # their entries take registers, too
        chosen = chosen._replace(keys=max(16, min(chosen.keys // 2, 32)))
    tile = tile or (Tile(64, 64, 4, 1) if interpreted() else chosen)
    d_low, d_high = _tiles.split(d)
    common = {
        **{name: _tiles.view(x, unit) for name, x in of_keys.items()},
        **{name: _tiles.view(x) for name, x in dict(lse=lse, mu=mu).items()},
        **grids,
        **dict(M=m, N=n, HEADS=h, GROUP=h // k.shape[1], log2_scale=scale * LOG2E.value, scale=scale),
        **dict(GIVEN=given, TANGENT=with_tangent, MOVES=moves, VALUES=not given or moves or precise),
        **dict(CAUSAL=options.is_causal, UNIT=unit, WHOLE=n % tile.keys == 0, ROWS=tile.rows, KEYS=tile.keys),
        **dict(D=d, D_LOW=d_low, D_HIGH=d_high),
    }
    each = []
    for first in range(0, dv, width):
        parts = {name: None if x is None else x[..., first : first + width] for name, x in of_values.items()}
        low, high = _tiles.split(min(width, dv - first))
        sizes = dict(DV=min(width, dv - first), DV_LOW=low, DV_HIGH=high)
        each.append({**common, **{name: _tiles.view(x, unit) for name, x in parts.items()}, **sizes})
    return each, tile, (o, to, lse, mu, o_exact, to_exact)


def _launch(
    q: Tensor, k, v, bias, mask, lse, tq, tk, tv, tbias, options: Options, with_tangent: bool, precise: bool,
    tile: Tile | None,
) -> tuple:  # fmt: skip
    shared = shared_memory(q.device)

    def run(tile: Tile | None) -> tuple:
        inputs = (q, k, v, bias, mask, lse, tq, tk, tv, tbias)
        each, tile, outputs = launches(*inputs, options, with_tangent, precise, tile, shared)
        programs = triton.cdiv(q.shape[2], tile.rows) * q.shape[0] * q.shape[1]
        for arguments in each if programs else ():
            _attend[(programs,)](**arguments, **tile.options())
        return outputs

    with _tiles.launching(q):
        if tile is None and _tuning.wanted():
            present = (with_tangent, *(x is not None for x in (lse, tq, tk, tv, tbias)))
            key = (*_tuning.kind(q, k, v, bias, mask, options), present, precise)
            chosen, _ = choose(q.dtype == torch.float32, q.shape[3], v.shape[3], with_tangent, shared)
            tile = _tuning.fastest(key, (chosen, *OTHERS), run)
        return run(tile)


@triton.jit
def _attend(
    q, k, v, tq, tk, tv, o, to, o_exact, to_exact, lse, mu, mask, bias, tbias,
    M, N, HEADS, GROUP, log2_scale, scale,
    GIVEN: tl.constexpr, TANGENT: tl.constexpr, MOVES: tl.constexpr, VALUES: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_LOW: tl.constexpr, D_HIGH: tl.constexpr,
    DV: tl.constexpr, DV_LOW: tl.constexpr, DV_HIGH: tl.constexpr,
):  # fmt: skip
    """ROWS queries of a head.

    GIVEN: lse is an input. MOVES: scores have tangents. VALUES: ``o`` is accumulated. WHOLE: all tiles have KEYS keys.
    """
    TYPE: tl.constexpr = v[0].dtype.element_ty
    tile, batch, index, shared = place(tl.cdiv(M, ROWS), HEADS, GROUP, CAUSAL)
    begin = tile * ROWS
    row = begin + tl.arange(0, ROWS)
    q_low, q_high = load(head(q, batch, index, UNIT), q[3] * UNIT, begin, M, ROWS, False, D, D_LOW, D_HIGH)
    tq_low, tq_high = q_low, q_high
    if tq is not None:
        tq_low, tq_high = load(head(tq, batch, index, UNIT), tq[3] * UNIT, begin, M, ROWS, False, D, D_LOW, D_HIGH)
    lse_at = head(lse, batch, index, 1) + row
    if GIVEN:  # rows without keys, of which lse is -inf, get e = 0
        known = tl.load(lse_at, mask=row < M, other=float("-inf"))
        m = tl.where(known == float("-inf"), float("inf"), known * LOG2E - LIFT)
    else:
        m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    lt = l
    r = l
    c = l
    o_low = tl.zeros((ROWS, DV_LOW), tl.float32)
    o_high = tl.zeros((ROWS, DV_HIGH if DV_HIGH > 0 else 16), tl.float32)
    to_low = o_low
    to_high = o_high
    k_at = head(k, batch, shared, UNIT)
    v_at = head(v, batch, shared, UNIT)
    if tk is not None:
        tk_at = head(tk, batch, shared, UNIT)
    if tv is not None:
        tv_at = head(tv, batch, shared, UNIT)
    last = N
    if CAUSAL:
        last = tl.minimum(N, begin + ROWS)
    # One loop, also where only its end needs a mask: in two, ptxas no longer overlaps Hopper's dots.
    for start in range(0, last, KEYS):
        key = start + tl.arange(0, KEYS)[None, :]
        k_low, k_high = load(k_at, k[3] * UNIT, start, N, KEYS, WHOLE, D, D_LOW, D_HIGH)
        none = tl.zeros((ROWS, KEYS), tl.float32)
        s = scores(q_low, q_high, k_low, k_high, none, D_HIGH)
        unscaled = log2_scale
        if bias is not None:
            s = s * log2_scale + grid(bias, batch, index, row[:, None], key, M, N).to(tl.float32) * LOG2E
            unscaled = 1.0
        if CAUSAL or (mask is not None) or (not WHOLE):
            seen = attended(mask, batch, index, row[:, None], key, M, N, CAUSAL, WHOLE)
            s = tl.where(seen, s, float("-inf"))
        if GIVEN:
            e = tl.exp2(s * unscaled - m[:, None])
        else:
            higher = tl.maximum(m, tl.max(s, 1) * unscaled)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            e = tl.exp2(s * unscaled - finite[:, None])
            shrink = tl.exp2(m - finite)
            m = higher
        if MOVES:
            t = none
            if tq is not None:
                t = scores(tq_low, tq_high, k_low, k_high, t, D_HIGH)
            if tk is not None:
                tk_low, tk_high = load(tk_at, tk[3] * UNIT, start, N, KEYS, WHOLE, D, D_LOW, D_HIGH)
                t = scores(q_low, q_high, tk_low, tk_high, t, D_HIGH)
            unmoved = scale
            if tbias is not None:
                t = t * scale + grid(tbias, batch, index, row[:, None], key, M, N).to(tl.float32)
                unmoved = 1.0
            if mask is not None:
                t = tl.where(seen, t, 0.0)
            total = tl.sum(e, 1)
            first = tl.sum(e * t, 1) * unmoved / tl.where(total == 0, 1.0, total)
            c = tl.where(lt == 0, first, c)  # fixed by the first tile in which the row has a key
            moved, moved_sum = rounded_sum(e * (t * unmoved - c[:, None]), TYPE)
        if not GIVEN:
            l = l * shrink + tl.sum(e, 1)
            o_low *= shrink[:, None]
            o_high *= shrink[:, None]
            if TANGENT:
                lt *= shrink
                r *= shrink
                to_low *= shrink[:, None]
                to_high *= shrink[:, None]
        if TANGENT:
            weights, weights_sum = rounded_sum(e, TYPE)
            lt += weights_sum
        else:
            weights = rounded(e, TYPE)
        v_low, v_high = load(v_at, v[3] * UNIT, start, N, KEYS, WHOLE, DV, DV_LOW, DV_HIGH)
        if VALUES:
            o_low = dot(weights, v_low, o_low)
            if DV_HIGH > 0:
                o_high = dot(weights, v_high, o_high)
        if MOVES:
            r += moved_sum
            to_low = dot(moved, v_low, to_low)
            if DV_HIGH > 0:
                to_high = dot(moved, v_high, to_high)
        if tv is not None:
            tv_low, tv_high = load(tv_at, tv[3] * UNIT, start, N, KEYS, WHOLE, DV, DV_LOW, DV_HIGH)
            to_low = dot(weights, tv_low, to_low)
            if DV_HIGH > 0:
                to_high = dot(weights, tv_high, to_high)
    if not TANGENT:  # nothing cancels in o: the exact sum, which lse needs anyway, divides as well
        lt = l
    inverse = 1.0 / tl.where(lt == 0, 1.0, lt)
    o_low *= inverse[:, None]
    o_high *= inverse[:, None]
    if not GIVEN:
        store(head(o, batch, index, UNIT), o[3] * UNIT, begin, M, o_low, o_high, ROWS, DV, DV_LOW, DV_HIGH)
        tl.store(lse_at, (m + tl.log2(l)) * LN2, mask=row < M)
    if o_exact is not None:
        at = head(o_exact, batch, index, UNIT)
        store(at, o_exact[3] * UNIT, begin, M, o_low, o_high, ROWS, DV, DV_LOW, DV_HIGH)
    if TANGENT:
        over = r * inverse
        to_low = to_low * inverse[:, None] - over[:, None] * o_low
        to_high = to_high * inverse[:, None] - over[:, None] * o_high
        store(head(to, batch, index, UNIT), to[3] * UNIT, begin, M, to_low, to_high, ROWS, DV, DV_LOW, DV_HIGH)
        tl.store(head(mu, batch, index, 1) + row, c + over, mask=row < M)
        if to_exact is not None:
            at = head(to_exact, batch, index, UNIT)
            store(at, to_exact[3] * UNIT, begin, M, to_low, to_high, ROWS, DV, DV_LOW, DV_HIGH)
