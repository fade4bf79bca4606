"""The forward kernels of span attention in Triton; the mathematics is at the head of triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import rounded
from .triton_device import (
    LN2,
    LOG2E,
    add_product,
    factors,
    finite,
    gather_rows,
    hull,
    load_rows,
    load_spans,
    not_finite,
    scatter_rows,
    scores,
    steps,
    weight,
    zeros,
)


@triton.jit
def _attend(
    acc0, acc1, m, total,  # [BM, V0], [BM, V1], [BM], [BM]: running weighted values, maximum and sum of weights
    q0, q1, k, v, stride_kt8, stride_vt8, b_lo, b_hi, first, before, jump, count, end, to_cap, factor,
    HEAD: tl.constexpr, VALUE: tl.constexpr, MATH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take in `count` blocks of keys. Those of both ends, which need masks, are one loop: it jumps over the rest."""
    V1: tl.constexpr = VALUE[2]
    for step in tl.range(0, count):
        j0 = first + step * BLOCK_N
        if MASKED:
            j0 += tl.where(step >= before, jump, 0)
        k0, k1 = load_rows(k + j0.to(tl.int64) * stride_kt8 * 8, stride_kt8, end - j0, BLOCK_N, HEAD, MASKED)
        s = scores(q0, q1, k0, k1, to_cap, HEAD, MATH)  # [BM, BN]
        if MASKED:
            j = j0 + tl.arange(0, BLOCK_N)[None, :]
            sees = (j >= b_lo[:, None]) & (j < b_hi[:, None])
            s = tl.where(sees, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
        p = weight(s, factor, pivot[:, None], MATH)
        fade = weight(m, 1.0, pivot, MATH)
        total = total * fade + tl.sum(p, 1)
        v0, v1 = load_rows(v + j0.to(tl.int64) * stride_vt8 * 8, stride_vt8, end - j0, BLOCK_N, VALUE, MASKED)
        if MASKED:
            p = tl.where(sees, p + not_finite(v0, v1, VALUE)[None, :], 0.0)
            v0, v1 = finite(v0), finite(v1)
        acc0 *= fade[:, None]
        if V1 > 0:
            acc1 *= fade[:, None]
        acc0, acc1 = add_product(p, v0, v1, acc0, acc1, VALUE, MATH)
        m = m_new
    return acc0, acc1, m, total


@triton.jit
def _attend_run(
    acc0, acc1, m, total, q0, q1, k, v, stride_kt8, stride_vt8, lo, hi, at, inside, keys, part, parts, to_cap, factor,
    HEAD: tl.constexpr, VALUE: tl.constexpr, MATH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take in this program's part of the keys of one run."""
    b_lo, b_hi = load_spans(lo, hi, at, inside, keys)
    first, end, common_first, common_end = hull(b_lo, b_hi, inside, keys)
    length = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), BLOCK_N), parts) * BLOCK_N
    first += part * length
    end = tl.minimum(end, first + length)
    common_first, common_end = tl.maximum(common_first, first), tl.minimum(common_end, end)
    HALF: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 16 else BLOCK_N
    before, within, after = steps(first, end, common_first, common_end, BLOCK_N, HALF)
    acc0, acc1, m, total = _attend(
        acc0, acc1, m, total, q0, q1, k, v, stride_kt8, stride_vt8, b_lo, b_hi, first + before * HALF, 0, 0, within,
        end, to_cap, factor, HEAD, VALUE, MATH, BLOCK_N, False,
    )  # fmt: skip
    return _attend(
        acc0, acc1, m, total, q0, q1, k, v, stride_kt8, stride_vt8, b_lo, b_hi, first, before, within * BLOCK_N,
        before + after, end, to_cap, factor, HEAD, VALUE, MATH, HALF, True,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "stride_qb8", "stride_qt8", "stride_qh8", "stride_kb8", "stride_kt8", "stride_kh8",
        "stride_vb8", "stride_vt8", "stride_vh8", "queries", "keys", "heads", "group", "packed", "runs", "stride_sb",
        "parts", "part_size", "lse_size",
    ],
    do_not_specialize_on_alignment=["lo", "hi"],
)  # fmt: skip
def forward(
    q, k, v,  # [B, Tq, Hq, D], [B, Tk, Hkv, D], [B, Tk, Hkv, DV]
    lo, hi,  # [B or 1, runs, Tq]
    out,  # [parts, B, Tq, Hq, DV_OUT]
    lse,  # [parts, B, Hq, Tq]
    stride_qb8, stride_qt8, stride_qh8, stride_kb8, stride_kt8, stride_kh8, stride_vb8, stride_vt8, stride_vh8,
    queries, keys, heads, group, packed, runs, stride_sb, parts, part_size, lse_size, scale, cap,
    HEAD: tl.constexpr, VALUE: tl.constexpr, DV_OUT: tl.constexpr, MATH: tl.constexpr, ONE_RUN: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one key head against one part of their keys. A row is a query of one head; `packed` heads of a
    group lie side by side, so that the few queries of a decoding step share the keys that are read."""
    blocks = tl.cdiv(queries * packed, BLOCK_M)
    # The last blocks of a causal text are the longest: they begin first.
    block, rest = blocks - 1 - tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head0, rest = rest % (heads // packed) * packed, rest // (heads // packed)
    part, batch = rest % parts, (rest // parts).to(tl.int64)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < queries * packed
    i, slot, i0 = row, 0, block * BLOCK_M
    if PACKED:
        i, slot, i0 = row // packed, row % packed, i0 // packed
    q += (batch * stride_qb8 + i0.to(tl.int64) * stride_qt8 + head0.to(tl.int64) * stride_qh8) * 8
    q0, q1 = gather_rows(q, ((i - i0) * stride_qt8 + slot * stride_qh8) * 8, inside, HEAD)
    key_head = (head0 // group).to(tl.int64)
    k += (batch * stride_kb8 + key_head * stride_kh8) * 8
    v += (batch * stride_vb8 + key_head * stride_vh8) * 8
    lo += batch * stride_sb
    hi += batch * stride_sb
    to_cap, factor = factors(scale, cap, MATH)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0, acc1 = zeros(BLOCK_M, VALUE)
    if ONE_RUN:
        acc0, acc1, m, total = _attend_run(
            acc0, acc1, m, total, q0, q1, k, v, stride_kt8, stride_vt8, lo, hi, i, inside, keys, part, parts, to_cap,
            factor, HEAD, VALUE, MATH, BLOCK_N,
        )  # fmt: skip
    else:
        for run in tl.range(0, runs):
            acc0, acc1, m, total = _attend_run(
                acc0, acc1, m, total, q0, q1, k, v, stride_kt8, stride_vt8, lo, hi, run * queries + i, inside, keys,
                part, parts, to_cap, factor, HEAD, VALUE, MATH, BLOCK_N,
            )  # fmt: skip

    EXACT: tl.constexpr = MATH[1]
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    natural = m + tl.log(total) if EXACT else (m + tl.log2(total)) * LN2
    p_lse = lse + part * lse_size + (batch * heads + head0) * queries
    tl.store(p_lse + slot * queries + i, tl.where(empty, float("-inf"), natural), mask=inside)
    out += part * part_size + ((batch * queries + i0) * heads + head0) * DV_OUT
    scatter_rows(out, ((i - i0) * heads + slot) * DV_OUT, inside, acc0, acc1, (1.0 / total)[:, None], DV_OUT, VALUE)


@triton.jit(do_not_specialize=["queries", "heads", "rows", "parts", "part_size", "lse_size"])
def merge(
    part_out,  # [parts, rows, DV], rows = (B, Tq, Hq); float32
    part_lse,  # [parts, B, Hq, Tq]
    out,  # [rows, DV]
    lse,  # [B, Hq, Tq]
    queries, heads, rows, parts, part_size, lse_size,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Join what the parts of the keys gave, in their order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    head, i, batch = row % heads, row // heads % queries, row // heads // queries
    p_lse = part_lse + (batch * heads + head) * queries + i
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for part in range(0, parts):
        m = tl.maximum(m, tl.load(p_lse + part * lse_size, mask=inside, other=float("-inf")))
    pivot = tl.where(m == float("-inf"), 0.0, m)
    column = tl.arange(0, BLOCK_N)[None, :]
    stored = inside[:, None] & (column < DV)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in range(0, parts):
        share = tl.exp2((tl.load(p_lse + part * lse_size, mask=inside, other=float("-inf")) - pivot) * LOG2E)
        p_part = part_out + part * part_size + row[:, None] * DV + column
        acc += share[:, None] * tl.load(p_part, mask=stored, other=0.0)
        total += share
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(out + row[:, None] * DV + column, rounded(acc / total[:, None], out.dtype.element_ty), mask=stored)
    natural = tl.where(empty, float("-inf"), m + tl.log(total))
    tl.store(lse + (batch * heads + head) * queries + i, natural, mask=inside)
