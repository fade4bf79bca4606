"""The backward kernels of span attention in Triton; the mathematics is at the head of triton.py.

A product with rows that hold NaN is NaN, so these reach dS, and their gradients, wherever they are seen; in the loops
with masks, where others do not see them, they are multiplied as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...spans import HULL_ROWS
from .triton_device import (
    LOG2E,
    add_product,
    factors,
    finite,
    gather_rows,
    hull,
    load_rows,
    load_spans,
    not_finite,
    product,
    scatter_rows,
    scores,
    steps,
    weight,
    zeros,
)

HULL = tl.constexpr(HULL_ROWS)
LARGEST = tl.constexpr(2**31 - 1)


# ------------------------------------------------------------------ dQ, and what dK and dV need too


@triton.jit
def _query_loop(
    dq0, dq1, q0, q1, g0, g1, b_lse, b_delta, k, v, stride_kt8, stride_vt8, b_lo, b_hi, first, before, jump, count,
    end, to_cap, factor,
    HEAD: tl.constexpr, VALUE: tl.constexpr, MATH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what `count` blocks of keys give to dQ / scale; blocks as in the forward kernel."""
    CAPPED: tl.constexpr = MATH[0]
    for step in tl.range(0, count):
        j0 = first + step * BLOCK_N
        if MASKED:
            j0 += tl.where(step >= before, jump, 0)
        k0, k1 = load_rows(k + j0.to(tl.int64) * stride_kt8 * 8, stride_kt8, end - j0, BLOCK_N, HEAD, MASKED)
        v0, v1 = load_rows(v + j0.to(tl.int64) * stride_vt8 * 8, stride_vt8, end - j0, BLOCK_N, VALUE, MASKED)
        s = scores(q0, q1, k0, k1, to_cap, HEAD, MATH)  # [BM, BN]
        p = weight(s, factor, b_lse[:, None], MATH)
        ds = p * (product(g0, g1, v0, v1, VALUE, MATH) - b_delta[:, None])
        if CAPPED:
            ds *= 1.0 - s * s
        if MASKED:
            j = j0 + tl.arange(0, BLOCK_N)[None, :]
            sees = (j >= b_lo[:, None]) & (j < b_hi[:, None])
            ds = tl.where(sees, ds, 0.0)  # NaN where a key is that is seen
            k0, k1 = finite(k0), finite(k1)
        dq0, dq1 = add_product(ds, k0, k1, dq0, dq1, HEAD, MATH)
    return dq0, dq1


@triton.jit
def _query_run(
    dq0, dq1, q0, q1, g0, g1, b_lse, b_delta, k, v, stride_kt8, stride_vt8, lo, hi, at, inside, keys, to_cap, factor,
    HEAD: tl.constexpr, VALUE: tl.constexpr, MATH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b_lo, b_hi = load_spans(lo, hi, at, inside, keys)
    first, end, common_first, common_end = hull(b_lo, b_hi, inside, keys)
    HALF: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 16 else BLOCK_N
    before, within, after = steps(first, end, common_first, common_end, BLOCK_N, HALF)
    dq0, dq1 = _query_loop(
        dq0, dq1, q0, q1, g0, g1, b_lse, b_delta, k, v, stride_kt8, stride_vt8, b_lo, b_hi, first + before * HALF,
        0, 0, within, end, to_cap, factor, HEAD, VALUE, MATH, BLOCK_N, False,
    )  # fmt: skip
    return _query_loop(
        dq0, dq1, q0, q1, g0, g1, b_lse, b_delta, k, v, stride_kt8, stride_vt8, b_lo, b_hi, first, before,
        within * BLOCK_N, before + after, end, to_cap, factor, HEAD, VALUE, MATH, HALF, True,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "stride_qb8", "stride_qt8", "stride_qh8", "stride_kb8", "stride_kt8", "stride_kh8",
        "stride_vb8", "stride_vt8", "stride_vh8", "stride_gb8", "stride_gt8", "stride_gh8",
        "stride_ob8", "stride_ot8", "stride_oh8", "queries", "keys", "heads", "group", "runs", "stride_sb",
    ],
    do_not_specialize_on_alignment=["lo", "hi"],
)  # fmt: skip
def query_grad(
    q, k, v,  # [B, Tq, Hq, D], [B, Tk, Hkv, D], [B, Tk, Hkv, DV]
    grad, out,  # [B, Tq, Hq, DV]
    lo, hi,  # [B or 1, runs, Tq]
    lse, d_lse,  # [B, Hq, Tq]; the latter is read if LSE_GRAD
    reference, delta,  # [B, Hq, Tq], written: lse in the units of `factors`, NaN where dO is not finite, and delta
    d_q,  # [B, Tq, Hq, D_OUT]
    stride_qb8, stride_qt8, stride_qh8, stride_kb8, stride_kt8, stride_kh8, stride_vb8, stride_vt8, stride_vh8,
    stride_gb8, stride_gt8, stride_gh8, stride_ob8, stride_ot8, stride_oh8,
    queries, keys, heads, group, runs, stride_sb, scale, cap,
    HEAD: tl.constexpr, VALUE: tl.constexpr, D_OUT: tl.constexpr, MATH: tl.constexpr, ONE_RUN: tl.constexpr,
    LSE_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_M)
    block, rest = blocks - 1 - tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, batch = rest % heads, (rest // heads).to(tl.int64)
    rows, i0, head64 = tl.arange(0, BLOCK_M), (block * BLOCK_M).to(tl.int64), head.to(tl.int64)
    i = block * BLOCK_M + rows
    inside = i < queries
    q += (batch * stride_qb8 + head64 * stride_qh8 + i0 * stride_qt8) * 8
    grad += (batch * stride_gb8 + head64 * stride_gh8 + i0 * stride_gt8) * 8
    out += (batch * stride_ob8 + head64 * stride_oh8 + i0 * stride_ot8) * 8
    q0, q1 = gather_rows(q, rows * stride_qt8 * 8, inside, HEAD)
    g0, g1 = gather_rows(grad, rows * stride_gt8 * 8, inside, VALUE)
    o0, o1 = gather_rows(out, rows * stride_ot8 * 8, inside, VALUE)
    b_delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    V1: tl.constexpr = VALUE[2]
    if V1 > 0:
        b_delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    line = (batch * heads + head) * queries
    b_lse = tl.load(lse + line + i, mask=inside, other=0.0)
    if LSE_GRAD:
        sees = inside & (b_lse != float("-inf"))  # of others, d_lse may hold anything
        b_delta -= tl.load(d_lse + line + i, mask=sees, other=0.0)
    tl.store(delta + line + i, b_delta, mask=inside)
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)  # of rows that see nothing, whose weights masks make 0
    EXACT: tl.constexpr = MATH[1]
    if not EXACT:
        b_lse *= LOG2E
    tl.store(reference + line + i, b_lse + not_finite(g0, g1, VALUE), mask=inside)
    key_head = (head // group).to(tl.int64)
    k += (batch * stride_kb8 + key_head * stride_kh8) * 8
    v += (batch * stride_vb8 + key_head * stride_vh8) * 8
    lo += batch * stride_sb
    hi += batch * stride_sb
    to_cap, factor = factors(scale, cap, MATH)

    dq0, dq1 = zeros(BLOCK_M, HEAD)
    if ONE_RUN:
        dq0, dq1 = _query_run(
            dq0, dq1, q0, q1, g0, g1, b_lse, b_delta, k, v, stride_kt8, stride_vt8, lo, hi, i, inside, keys, to_cap,
            factor, HEAD, VALUE, MATH, BLOCK_N,
        )  # fmt: skip
    else:
        for run in tl.range(0, runs):
            dq0, dq1 = _query_run(
                dq0, dq1, q0, q1, g0, g1, b_lse, b_delta, k, v, stride_kt8, stride_vt8, lo, hi, run * queries + i,
                inside, keys, to_cap, factor, HEAD, VALUE, MATH, BLOCK_N,
            )  # fmt: skip
    d_q += ((batch * queries + i0) * heads + head) * D_OUT
    scatter_rows(d_q, rows * heads * D_OUT, inside, dq0, dq1, scale, D_OUT, HEAD)


# ------------------------------------------------------------------ which queries see a block of keys


@triton.jit
def _sights(hulls, x, j0, hulls_count, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For blocks x of BLOCK_M queries: whether any of one sees any of the keys from j0 on, and whether all see all."""
    any_sees = x < 0
    all_see = (x + 1) * BLOCK_M <= queries
    for part in tl.static_range(BLOCK_M // HULL):
        entry = x * (BLOCK_M // HULL) + part
        inside = entry < hulls_count
        p_hull = hulls + entry * 4
        first, end = tl.load(p_hull, mask=inside, other=LARGEST), tl.load(p_hull + 1, mask=inside, other=0)
        common_first = tl.load(p_hull + 2, mask=inside, other=LARGEST)
        common_end = tl.load(p_hull + 3, mask=inside, other=0)
        any_sees = any_sees | ((first < j0 + BLOCK_N) & (end > j0))
        all_see = all_see & (common_first <= j0) & (common_end >= tl.minimum(j0 + BLOCK_N, keys))
    return any_sees, all_see


@triton.jit(do_not_specialize=["hulls_count", "queries", "keys"])
def key_table(
    hulls,  # [slices, hulls_count, 4]: RowSpans.hulls(), a slice being a run of a row of the batch
    table,  # [slices, blocks of keys, 4]
    hulls_count, queries, keys,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For a block of keys the blocks of queries [first, end) outside which none sees it, and within these the first run
    of blocks in which every query sees all of it, which needs no masks."""
    key_blocks, query_blocks = tl.cdiv(keys, BLOCK_N), tl.cdiv(queries, BLOCK_M)
    j0 = tl.program_id(0) % key_blocks * BLOCK_N
    hulls += (tl.program_id(0) // key_blocks).to(tl.int64) * hulls_count * 4
    first, end, full = query_blocks, 0, query_blocks
    for x0 in range(0, query_blocks, BLOCK):
        x = x0 + tl.arange(0, BLOCK)
        any_sees, all_see = _sights(hulls, x, j0, hulls_count, queries, keys, BLOCK_M, BLOCK_N)
        first = tl.minimum(first, tl.min(tl.where(any_sees, x, query_blocks), 0))
        end = tl.maximum(end, tl.max(tl.where(any_sees, x + 1, 0), 0))
        full = tl.minimum(full, tl.min(tl.where(all_see, x, query_blocks), 0))
    full_end = end
    for x0 in range(full, end, BLOCK):
        x = x0 + tl.arange(0, BLOCK)
        _, all_see = _sights(hulls, x, j0, hulls_count, queries, keys, BLOCK_M, BLOCK_N)
        full_end = tl.minimum(full_end, tl.min(tl.where(all_see, query_blocks, x), 0))
    first = tl.minimum(first, end)
    full = tl.minimum(full, end)
    p_table = table + tl.program_id(0).to(tl.int64) * 4
    tl.store(p_table, first)
    tl.store(p_table + 1, end)
    tl.store(p_table + 2, full)
    tl.store(p_table + 3, tl.maximum(full, full_end))


# ------------------------------------------------------------------ dK and dV, of transposed scores


@triton.jit
def _key_loop(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad, reference, delta, lo, hi, stride_qt8, stride_qh8, stride_gt8,
    stride_gh8, j, queries, group, first, before, jump, blocks, part, parts, to_cap, factor,
    HEAD: tl.constexpr, VALUE: tl.constexpr, MATH: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what `blocks` blocks of queries of every head of the group give, or this part of them, to dK / scale and dV.

    Heads and blocks are one loop: of two nested ones, the inner is a pipeline that starts anew for each head.
    """
    CAPPED: tl.constexpr = MATH[0]
    count = blocks * group
    for step in tl.range((count * part) // parts, (count * (part + 1)) // parts):
        head, block = step // blocks, step % blocks
        i0 = first + block * BLOCK_M
        if MASKED:
            i0 += tl.where(block >= before, jump, 0)
        i = i0 + tl.arange(0, BLOCK_M)
        q_row = i0.to(tl.int64) * stride_qt8 + head.to(tl.int64) * stride_qh8
        g_row = i0.to(tl.int64) * stride_gt8 + head.to(tl.int64) * stride_gh8
        q0, q1 = load_rows(q + q_row * 8, stride_qt8, queries - i0, BLOCK_M, HEAD, MASKED)
        g0, g1 = load_rows(grad + g_row * 8, stride_gt8, queries - i0, BLOCK_M, VALUE, MASKED)
        line = head.to(tl.int64) * queries
        s = scores(k0, k1, q0, q1, to_cap, HEAD, MATH)  # [BN, BM]
        p = weight(s, factor, tl.load(reference + line + i, mask=i < queries, other=0.0)[None, :], MATH)
        if MASKED:
            b_lo = tl.load(lo + i, mask=i < queries, other=0)
            b_hi = tl.load(hi + i, mask=i < queries, other=0)
            p = tl.where((j[:, None] >= b_lo[None, :]) & (j[:, None] < b_hi[None, :]), p, 0.0)
        if WANT_K:
            b_delta = tl.load(delta + line + i, mask=i < queries, other=0.0)
            ds = p * (product(v0, v1, g0, g1, VALUE, MATH) - b_delta[None, :])
            if CAPPED:
                ds *= 1.0 - s * s
            if MASKED:
                ds = tl.where((j[:, None] >= b_lo[None, :]) & (j[:, None] < b_hi[None, :]), ds, 0.0)
                q0, q1 = finite(q0), finite(q1)
            dk0, dk1 = add_product(ds, q0, q1, dk0, dk1, HEAD, MATH)
        if WANT_V:
            if MASKED:
                g0, g1 = finite(g0), finite(g1)
            dv0, dv1 = add_product(p, g0, g1, dv0, dv1, VALUE, MATH)
    return dk0, dk1, dv0, dv1


@triton.jit
def _key_run(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad, reference, delta, lo, hi, p_table, stride_qt8, stride_qh8, stride_gt8,
    stride_gh8, j, queries, group, part, parts, to_cap, factor,
    HEAD: tl.constexpr, VALUE: tl.constexpr, MATH: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    # The table tells of blocks of ROWS queries, of which a step takes a part: where masks are none, the whole of it if
    # BLOCK_M is that.
    ROWS: tl.constexpr = BLOCK_M if BLOCK_M > HULL else HULL
    HALF: tl.constexpr = BLOCK_M // 2 if BLOCK_M > 16 else BLOCK_M
    first, end = tl.load(p_table), tl.load(p_table + 1)
    full, full_end = tl.load(p_table + 2), tl.load(p_table + 3)
    within = full_end - full
    dk0, dk1, dv0, dv1 = _key_loop(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad, reference, delta, lo, hi, stride_qt8, stride_qh8, stride_gt8,
        stride_gh8, j, queries, group, full * ROWS, 0, 0, within * (ROWS // BLOCK_M), part, parts, to_cap, factor,
        HEAD, VALUE, MATH, WANT_K, WANT_V, BLOCK_M, False,
    )  # fmt: skip
    return _key_loop(
        dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad, reference, delta, lo, hi, stride_qt8, stride_qh8, stride_gt8,
        stride_gh8, j, queries, group, first * ROWS, (full - first) * (ROWS // HALF), within * ROWS,
        (end - first - within) * (ROWS // HALF), part, parts, to_cap, factor, HEAD, VALUE, MATH, WANT_K, WANT_V, HALF,
        True,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "stride_qb8", "stride_qt8", "stride_qh8", "stride_kb8", "stride_kt8", "stride_kh8",
        "stride_vb8", "stride_vt8", "stride_vh8", "stride_gb8", "stride_gt8", "stride_gh8",
        "queries", "keys", "key_heads", "group", "runs", "stride_sb", "stride_tb", "parts", "k_size", "v_size",
    ],
    do_not_specialize_on_alignment=["lo", "hi"],
)  # fmt: skip
def key_grads(
    q, k, v,  # [B, Tq, Hq, D], [B, Tk, Hkv, D], [B, Tk, Hkv, DV]
    grad,  # [B, Tq, Hq, DV]
    lo, hi,  # [B or 1, runs, Tq]
    reference, delta,  # [B, Hq, Tq], of query_grad
    table,  # [B or 1, runs, blocks of keys, 4]
    d_k, d_v,  # [parts, B, Tk, Hkv, D_OUT], [parts, B, Tk, Hkv, DV_OUT]
    stride_qb8, stride_qt8, stride_qh8, stride_kb8, stride_kt8, stride_kh8, stride_vb8, stride_vt8, stride_vh8,
    stride_gb8, stride_gt8, stride_gh8,
    queries, keys, key_heads, group, runs, stride_sb, stride_tb, parts, k_size, v_size, scale, cap,
    HEAD: tl.constexpr, VALUE: tl.constexpr, D_OUT: tl.constexpr, DV_OUT: tl.constexpr, MATH: tl.constexpr,
    ONE_RUN: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one head against one part of the queries that see them, of every head of the group."""
    blocks = tl.cdiv(keys, BLOCK_N)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    key_head, rest = rest % key_heads, rest // key_heads
    part, batch = rest % parts, (rest // parts).to(tl.int64)
    rows, j0, head = tl.arange(0, BLOCK_N), (block * BLOCK_N).to(tl.int64), key_head.to(tl.int64)
    j = block * BLOCK_N + rows
    inside = j < keys
    k += (batch * stride_kb8 + head * stride_kh8 + j0 * stride_kt8) * 8
    v += (batch * stride_vb8 + head * stride_vh8 + j0 * stride_vt8) * 8
    k0, k1 = gather_rows(k, rows * stride_kt8 * 8, inside, HEAD)
    v0, v1 = gather_rows(v, rows * stride_vt8 * 8, inside, VALUE)
    q += (batch * stride_qb8 + head * group * stride_qh8) * 8
    grad += (batch * stride_gb8 + head * group * stride_gh8) * 8
    reference += (batch * key_heads + head) * group * queries
    delta += (batch * key_heads + head) * group * queries
    lo += batch * stride_sb
    hi += batch * stride_sb
    p_table = table + batch * stride_tb + block * 4
    to_cap, factor = factors(scale, cap, MATH)

    dk0, dk1 = zeros(BLOCK_N, HEAD)
    dv0, dv1 = zeros(BLOCK_N, VALUE)
    if ONE_RUN:
        dk0, dk1, dv0, dv1 = _key_run(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad, reference, delta, lo, hi, p_table, stride_qt8, stride_qh8,
            stride_gt8, stride_gh8, j, queries, group, part, parts, to_cap, factor,
            HEAD, VALUE, MATH, WANT_K, WANT_V, BLOCK_M,
        )  # fmt: skip
    else:
        for run in tl.range(0, runs):
            dk0, dk1, dv0, dv1 = _key_run(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, grad, reference, delta, lo + run * queries, hi + run * queries,
                p_table + run * blocks * 4, stride_qt8, stride_qh8, stride_gt8, stride_gh8, j, queries, group, part,
                parts, to_cap, factor,
                HEAD, VALUE, MATH, WANT_K, WANT_V, BLOCK_M,
            )  # fmt: skip

    row, rows = (batch * keys + j0) * key_heads + key_head, rows * key_heads
    if WANT_K:
        d_k += part * k_size + row * D_OUT
        scatter_rows(d_k, rows * D_OUT, inside, dk0, dk1, scale, D_OUT, HEAD)
    if WANT_V:
        d_v += part * v_size + row * DV_OUT
        scatter_rows(d_v, rows * DV_OUT, inside, dv0, dv1, 1.0, DV_OUT, VALUE)
