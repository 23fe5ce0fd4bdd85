"""Gradients of attention and of its tangent, on tiles that are computed again.

With upstream gradients ``g`` of ``o`` and ``h`` of ``to``, row vectors ``om = h . o`` and ``dl = g . o + h . to``, and
``W = h v^T``:

    dT = p * (W - om)                                             gradient of the tangents of scores
    dS = p * (g v^T + h tv^T - dl + (W - om) * (t - mu))          gradient of scores
    dq = scale (dS k + dT tk)     dk = scale (dS^T q + dT^T tq)     dv = p^T g + (p * (t - mu))^T h
    dtq = scale dT k              dtk = scale dT^T q                dtv = p^T h

``dL/dp`` is ``g v^T + h tv^T + W * (t - mu) - om * t``, because ``mu`` depends on ``p``; less its mean under ``p``,
which is ``dl - om * mu``, it is what multiplies ``p`` in dS. Gradients of keys are sums over queries and the other way
round, so each has a kernel of its own, which adds in one order always.

A kernel computes those of its gradients that are not ``None``, and loads what they need: the rest is dead code.
"""

import triton
import triton.language as tl

from genkit.attention._tiles import LOG2E, attended, dot, grid, head, load, place, rounded, scores, store


@triton.jit
def row_sums(
    o, to, g, h, om, dl, M, HEADS, UNIT: tl.constexpr, ROWS: tl.constexpr,
    DV: tl.constexpr, DV_LOW: tl.constexpr, DV_HIGH: tl.constexpr,
):  # fmt: skip
    """``om = h . o`` and ``dl = g . o + h . to``."""
    tile, batch, index, _ = place(tl.cdiv(M, ROWS), HEADS, 1, False)
    begin = tile * ROWS
    total = tl.zeros((ROWS,), tl.float32)
    if g is not None:
        total += _inner(g, o, batch, index, begin, M, ROWS, UNIT, DV, DV_LOW, DV_HIGH)
    if h is not None:
        total += _inner(h, to, batch, index, begin, M, ROWS, UNIT, DV, DV_LOW, DV_HIGH)
    row = begin + tl.arange(0, ROWS)
    tl.store(head(dl, batch, index, 1) + row, total, mask=row < M)
    if om is not None:
        total = _inner(h, o, batch, index, begin, M, ROWS, UNIT, DV, DV_LOW, DV_HIGH)
        tl.store(head(om, batch, index, 1) + row, total, mask=row < M)


@triton.jit
def _inner(
    a, b, batch, index, begin, M, ROWS: tl.constexpr, UNIT: tl.constexpr,
    DV: tl.constexpr, DV_LOW: tl.constexpr, DV_HIGH: tl.constexpr,
):  # fmt: skip
    a_low, a_high = load(head(a, batch, index, UNIT), a[3] * UNIT, begin, M, ROWS, False, DV, DV_LOW, DV_HIGH)
    b_low, b_high = load(head(b, batch, index, UNIT), b[3] * UNIT, begin, M, ROWS, False, DV, DV_LOW, DV_HIGH)
    total = tl.sum(a_low.to(tl.float32) * b_low.to(tl.float32), 1)
    if DV_HIGH > 0:
        total += tl.sum(a_high.to(tl.float32) * b_high.to(tl.float32), 1)
    return total


@triton.jit
def _rows(
    x, batch, index, start, size, UNIT: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Rows of a head as a pair of tiles; None of None."""
    if x is None:
        pair = None
    else:
        pair = load(head(x, batch, index, UNIT), x[3] * UNIT, start, size, ROWS, False, CHANNELS, LOW, HIGH)
    return pair


@triton.jit
def _vector(x, batch, index, row, M, other):
    if x is None:
        y = None
    else:
        y = tl.load(head(x, batch, index, 1) + row, mask=row < M, other=other)
    return y


@triton.jit
def _products(queries, keys, total, KEYS_FIRST: tl.constexpr, HIGH: tl.constexpr):
    """``total + queries keys^T``, or its transpose."""
    if KEYS_FIRST:
        total = scores(keys[0], keys[1], queries[0], queries[1], total, HIGH)
    else:
        total = scores(queries[0], queries[1], keys[0], keys[1], total, HIGH)
    return total


@triton.jit
def _none(ROWS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.zeros((ROWS, LOW), tl.float32), tl.zeros((ROWS, HIGH if HIGH > 0 else 16), tl.float32)


@triton.jit
def _add(total, weights, x, HIGH: tl.constexpr):
    """``total + weights x`` on pairs."""
    low = dot(weights, x[0], total[0])
    high = total[1]
    if HIGH > 0:
        high = dot(weights, x[1], high)
    return low, high


@triton.jit
def _tile(
    q, k, v, tq, tk, tv, g, h, lse, mu, om, dl, mask, bias, tbias, batch, index, row, key, M, N, scale,
    CAUSAL: tl.constexpr, KEYS_FIRST: tl.constexpr, D_HIGH: tl.constexpr, DV_HIGH: tl.constexpr,
):  # fmt: skip
    """``p``, ``p * (t - mu)``, dS and dT of a tile, as operands of dots; KEYS_FIRST: transposed.

    ``row``, ``key`` and the row vectors are shaped so that they broadcast to the tile. ``lse`` is inf where a row has
    no keys, so that ``p`` is 0 there.
    """
    none = tl.zeros_like(row.to(tl.float32) + key.to(tl.float32))
    s = _products(q, k, none, KEYS_FIRST, D_HIGH) * (scale * LOG2E)
    if bias is not None:
        s += grid(bias, batch, index, row, key, M, N).to(tl.float32) * LOG2E
    seen = attended(mask, batch, index, row, key, M, N, CAUSAL, False)
    p = tl.exp2(tl.where(seen, s, float("-inf")) - lse)
    ds = none - dl
    moved = p
    dt = p
    if mu is not None:
        t = none
        if tq is not None:
            t = _products(tq, k, t, KEYS_FIRST, D_HIGH)
        if tk is not None:
            t = _products(q, tk, t, KEYS_FIRST, D_HIGH)
        t *= scale
        if tbias is not None:
            t += grid(tbias, batch, index, row, key, M, N).to(tl.float32)
        t -= mu
        w = _products(h, v, none, KEYS_FIRST, DV_HIGH) - om
        ds += w * t
        moved = p * t
        dt = p * w
    if g is not None:
        ds = _products(g, v, ds, KEYS_FIRST, DV_HIGH)
    if tv is not None:
        ds = _products(h, tv, ds, KEYS_FIRST, DV_HIGH)
    return p, moved, p * ds, dt


@triton.jit
def of_keys(
    q, k, v, tq, tk, tv, g, h, lse, mu, om, dl, mask, bias, tbias, dk, dv, dtk, dtv, M, N, HEADS, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_LOW: tl.constexpr, D_HIGH: tl.constexpr,
    DV: tl.constexpr, DV_LOW: tl.constexpr, DV_HIGH: tl.constexpr,
):  # fmt: skip
    """Gradients of KEYS keys and values: sums over queries, and over the GROUP heads that share them."""
    TYPE: tl.constexpr = k[0].dtype.element_ty
    tile, batch, shared, _ = place(tl.cdiv(N, KEYS), HEADS, 1, False)
    begin = tile * KEYS
    key = begin + tl.arange(0, KEYS)[:, None]
    keys = _rows(k, batch, shared, begin, N, UNIT, KEYS, D, D_LOW, D_HIGH)
    tkeys = _rows(tk, batch, shared, begin, N, UNIT, KEYS, D, D_LOW, D_HIGH)
    values = _rows(v, batch, shared, begin, N, UNIT, KEYS, DV, DV_LOW, DV_HIGH)
    tvalues = _rows(tv, batch, shared, begin, N, UNIT, KEYS, DV, DV_LOW, DV_HIGH)
    into_k = _none(KEYS, D_LOW, D_HIGH)
    into_v = _none(KEYS, DV_LOW, DV_HIGH)
    into_tk = into_k
    into_tv = into_v
    first = begin // ROWS * ROWS if CAUSAL else 0
    for member in range(GROUP):
        index = shared * GROUP + member
        for start in range(first, M, ROWS):
            row = start + tl.arange(0, ROWS)[None, :]
            queries = _rows(q, batch, index, start, M, UNIT, ROWS, D, D_LOW, D_HIGH)
            tqueries = _rows(tq, batch, index, start, M, UNIT, ROWS, D, D_LOW, D_HIGH)
            into_o = _rows(g, batch, index, start, M, UNIT, ROWS, DV, DV_LOW, DV_HIGH)
            into_to = _rows(h, batch, index, start, M, UNIT, ROWS, DV, DV_LOW, DV_HIGH)
            p, moved, ds, dt = _tile(
                queries, keys, values, tqueries, tkeys, tvalues, into_o, into_to,
                _lse(lse, batch, index, row, M), _vector(mu, batch, index, row, M, 0.0),
                _vector(om, batch, index, row, M, 0.0), _vector(dl, batch, index, row, M, 0.0),
                mask, bias, tbias, batch, index, row, key, M, N, scale, CAUSAL, True, D_HIGH, DV_HIGH,
            )  # fmt: skip
            p = rounded(p, TYPE)
            if dv is not None:
                if g is not None:
                    into_v = _add(into_v, p, into_o, DV_HIGH)
                if mu is not None:
                    into_v = _add(into_v, rounded(moved, TYPE), into_to, DV_HIGH)
            if dtv is not None:
                into_tv = _add(into_tv, p, into_to, DV_HIGH)
            if dk is not None:
                into_k = _add(into_k, rounded(ds, TYPE), queries, D_HIGH)
                if tq is not None:
                    into_k = _add(into_k, rounded(dt, TYPE), tqueries, D_HIGH)
            if dtk is not None:
                into_tk = _add(into_tk, rounded(dt, TYPE), queries, D_HIGH)
    _write(dk, into_k, scale, batch, shared, begin, N, UNIT, KEYS, D, D_LOW, D_HIGH)
    _write(dv, into_v, 1.0, batch, shared, begin, N, UNIT, KEYS, DV, DV_LOW, DV_HIGH)
    _write(dtk, into_tk, scale, batch, shared, begin, N, UNIT, KEYS, D, D_LOW, D_HIGH)
    _write(dtv, into_tv, 1.0, batch, shared, begin, N, UNIT, KEYS, DV, DV_LOW, DV_HIGH)


@triton.jit
def of_queries(
    q, k, v, tq, tk, tv, g, h, lse, mu, om, dl, mask, bias, tbias, dq, dtq, M, N, HEADS, GROUP, scale,
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_LOW: tl.constexpr, D_HIGH: tl.constexpr,
    DV: tl.constexpr, DV_LOW: tl.constexpr, DV_HIGH: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS queries: sums over keys."""
    TYPE: tl.constexpr = q[0].dtype.element_ty
    tile, batch, index, shared = place(tl.cdiv(M, ROWS), HEADS, GROUP, CAUSAL)
    begin = tile * ROWS
    row = begin + tl.arange(0, ROWS)[:, None]
    queries = _rows(q, batch, index, begin, M, UNIT, ROWS, D, D_LOW, D_HIGH)
    tqueries = _rows(tq, batch, index, begin, M, UNIT, ROWS, D, D_LOW, D_HIGH)
    into_o = _rows(g, batch, index, begin, M, UNIT, ROWS, DV, DV_LOW, DV_HIGH)
    into_to = _rows(h, batch, index, begin, M, UNIT, ROWS, DV, DV_LOW, DV_HIGH)
    row_lse = _lse(lse, batch, index, row, M)
    row_mu = _vector(mu, batch, index, row, M, 0.0)
    row_om = _vector(om, batch, index, row, M, 0.0)
    row_dl = _vector(dl, batch, index, row, M, 0.0)
    into_q = _none(ROWS, D_LOW, D_HIGH)
    into_tq = into_q
    last = tl.minimum(N, begin + ROWS) if CAUSAL else N
    for start in range(0, last, KEYS):
        key = start + tl.arange(0, KEYS)[None, :]
        keys = _rows(k, batch, shared, start, N, UNIT, KEYS, D, D_LOW, D_HIGH)
        tkeys = _rows(tk, batch, shared, start, N, UNIT, KEYS, D, D_LOW, D_HIGH)
        values = _rows(v, batch, shared, start, N, UNIT, KEYS, DV, DV_LOW, DV_HIGH)
        tvalues = _rows(tv, batch, shared, start, N, UNIT, KEYS, DV, DV_LOW, DV_HIGH)
        _, _, ds, dt = _tile(
            queries, keys, values, tqueries, tkeys, tvalues, into_o, into_to, row_lse, row_mu, row_om, row_dl,
            mask, bias, tbias, batch, index, row, key, M, N, scale, CAUSAL, False, D_HIGH, DV_HIGH,
        )  # fmt: skip
        if dq is not None:
            into_q = _add(into_q, rounded(ds, TYPE), keys, D_HIGH)
            if tk is not None:
                into_q = _add(into_q, rounded(dt, TYPE), tkeys, D_HIGH)
        if dtq is not None:
            into_tq = _add(into_tq, rounded(dt, TYPE), keys, D_HIGH)
    _write(dq, into_q, scale, batch, index, begin, M, UNIT, ROWS, D, D_LOW, D_HIGH)
    _write(dtq, into_tq, scale, batch, index, begin, M, UNIT, ROWS, D, D_LOW, D_HIGH)


@triton.jit
def of_bias(
    q, k, v, tq, tk, tv, g, h, lse, mu, om, dl, mask, bias, tbias, dbias, dtbias, M, N, GROUP, scale,
    OWN_HEADS, OWN_ROWS, OWN_KEYS, BATCHES, HEADS, ROW_STEPS, KEY_STEPS,
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_LOW: tl.constexpr, D_HIGH: tl.constexpr,
    DV: tl.constexpr, DV_LOW: tl.constexpr, DV_HIGH: tl.constexpr, ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr,
):  # fmt: skip
    """A tile of the bias' own gradients: sums over the axes that it is broadcast along.

    OWN_... count the heads and tiles that the bias has; the bare names count those that a program sums over.
    """
    program = tl.program_id(0)
    own_key = program % OWN_KEYS
    own_row = program // OWN_KEYS % OWN_ROWS
    own_index = program // OWN_KEYS // OWN_ROWS % OWN_HEADS
    own_batch = program // OWN_KEYS // OWN_ROWS // OWN_HEADS
    total = tl.zeros((ROWS, KEYS), tl.float32)
    moving = total
    for step in range(BATCHES * HEADS * ROW_STEPS * KEY_STEPS):
        first_key = (own_key + step % KEY_STEPS) * KEYS
        first_row = (own_row + step // KEY_STEPS % ROW_STEPS) * ROWS
        index = own_index + step // KEY_STEPS // ROW_STEPS % HEADS
        batch = own_batch + step // KEY_STEPS // ROW_STEPS // HEADS
        row = first_row + tl.arange(0, ROWS)[:, None]
        key = first_key + tl.arange(0, KEYS)[None, :]
        _, _, ds, dt = _tile(
            _rows(q, batch, index, first_row, M, UNIT, ROWS, D, D_LOW, D_HIGH),
            _rows(k, batch, index // GROUP, first_key, N, UNIT, KEYS, D, D_LOW, D_HIGH),
            _rows(v, batch, index // GROUP, first_key, N, UNIT, KEYS, DV, DV_LOW, DV_HIGH),
            _rows(tq, batch, index, first_row, M, UNIT, ROWS, D, D_LOW, D_HIGH),
            _rows(tk, batch, index // GROUP, first_key, N, UNIT, KEYS, D, D_LOW, D_HIGH),
            _rows(tv, batch, index // GROUP, first_key, N, UNIT, KEYS, DV, DV_LOW, DV_HIGH),
            _rows(g, batch, index, first_row, M, UNIT, ROWS, DV, DV_LOW, DV_HIGH),
            _rows(h, batch, index, first_row, M, UNIT, ROWS, DV, DV_LOW, DV_HIGH),
            _lse(lse, batch, index, row, M), _vector(mu, batch, index, row, M, 0.0),
            _vector(om, batch, index, row, M, 0.0), _vector(dl, batch, index, row, M, 0.0),
            mask, bias, tbias, batch, index, row, key, M, N, scale, CAUSAL, False, D_HIGH, DV_HIGH,
        )  # fmt: skip
        total += ds
        moving += dt
    row = own_row * ROWS + tl.arange(0, ROWS)[:, None]
    key = own_key * KEYS + tl.arange(0, KEYS)[None, :]
    _write_bias(dbias, total, own_batch, own_index, row, key, M, N, ONE_ROW, ONE_KEY)
    _write_bias(dtbias, moving, own_batch, own_index, row, key, M, N, ONE_ROW, ONE_KEY)


@triton.jit
def _write_bias(x, total, batch, index, row, key, M, N, ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr):
    if x is not None:
        if ONE_ROW:
            total = tl.sum(total, 0, keep_dims=True)
        if ONE_KEY:
            total = tl.sum(total, 1, keep_dims=True)
            key = tl.min(key, 1, keep_dims=True)
        at = x[0] + batch.to(tl.int64) * x[1] + index.to(tl.int64) * x[2] + key.to(tl.int64) * x[4]
        inside = key < N
        if not ONE_ROW:
            at += row.to(tl.int64) * x[3]
            inside = inside & (row < M)
        tl.store(at, rounded(total, x[0].dtype.element_ty), mask=inside)


@triton.jit
def _lse(lse, batch, index, row, M):
    """``lse`` in base 2; where a row has no keys, or is none, inf: what is -inf less inf has probability 0."""
    x = _vector(lse, batch, index, row, M, float("-inf"))
    return tl.where(x == float("-inf"), float("inf"), x * LOG2E)


@triton.jit
def _write(
    x, total, factor, batch, index, start, size, UNIT: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    if x is not None:
        at = head(x, batch, index, UNIT)
        store(at, x[3] * UNIT, start, size, total[0] * factor, total[1] * factor, ROWS, CHANNELS, LOW, HIGH)
