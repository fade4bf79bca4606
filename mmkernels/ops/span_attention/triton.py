"""Span attention in Triton: no N x N matrix, any layout, the same bits in every run.

For query i of head h, which sees the keys j of its runs lo <= j < hi, with c the scale and u the softcap:

    S_ij = c q_i . k_j   [or u tanh(c q_i . k_j / u)],   P_ij = exp(S_ij - lse_i),   O_i = sum_j P_ij v_j
    delta_i = dO_i . O_i - dlse_i,   dS_ij = P_ij (dO_i . v_j - delta_i)   [times 1 - (S_ij / u)^2]
    dQ_i = c sum_j dS_ij k_j,   dK_j = c sum_i dS_ij q_i,   dV_j = sum_i P_ij dO_i

`forward` keeps a block of queries and walks blocks of keys with an online softmax. Of the block's spans it takes the
hull [min lo, max hi), outside which no key is read, and the common part [max lo, min hi), inside which no mask is
computed; the keys at the hull's two ends are one loop, which jumps over the common part. `query_grad` does the same
for dQ, and leaves delta. `key_grads` keeps a block of keys and walks the blocks of queries that see any of it, for
every head of the group in one loop; which these are `key_table` finds, from what 32 neighbouring queries have in
common (`RowSpans.hulls`). No sum is atomic. Where there are few programs, as in decoding, keys (or queries) are
split into parts, by sizes alone, and the parts are summed in their order.

What a query does not see reaches it in no way, though weights of 0 would let NaN through: masked loops multiply rows
whose NaNs and infinities are made 0, and give NaN to the queries that do see such a row.

Operations: 2 T T' (D + Dv) a head forward for T' keys a query, 2 T T' (5 D + 2 Dv) or so backward, S being computed
twice. Memory moved: q, out and the gradients once; keys and values once a block of queries, mostly from the L2 cache,
since neighbouring programs share a head.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...spans import HULL_ROWS
from .. import _triton
from .._aligned_rows import aligned_rows
from .._checks import in_words
from .._triton import Tile, launch
from .limits import too_wide
from .params import Params
from .triton_backward import key_grads, key_table, query_grad
from .triton_forward import forward, merge
from .triton_tiles import FEW_ROWS, LARGEST_BLOCK, LARGEST_HEAD, Width, gradient_passes, largest_head, tile_of

PROGRAMS = 256  # that a split of the keys, or of the queries, aims at: two for each multiprocessor of the largest GPUs
# Keys, or queries, that are worth a program of their own. Few when interpreted, so that small tests split.
SPLIT_STEP = 64 if _triton.INTERPRET.value else 512
MERGE_ROWS, TABLE_BLOCK = 16, 256


def unsupported(q: Tensor, k: Tensor, v: Tensor, params: Params | None = None) -> str | None:
    unsupported = _triton.unsupported_tensor("q", q)
    if unsupported:
        return unsupported
    largest = largest_head(_triton.family(q.device), q.dtype)
    wide = too_wide(q, k, v, largest)
    return f"in {in_words([q.dtype])} {wide}" if wide and largest < LARGEST_HEAD else wide


def span_attention(q: Tensor, k: Tensor, v: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    group, value_width = heads // k.shape[2], v.shape[3]
    out = q.new_empty(batch, queries, heads, value_width)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    lo, hi, *_ = params
    _, scale, q = _positive_scale(params.scale, q)
    packed = group if queries < FEW_ROWS else 1
    tile = _tile("few_rows" if queries * packed <= FEW_ROWS else "forward", q, v)
    programs = batch * (heads // packed) * triton.cdiv(queries * packed, tile.BLOCK_M)
    parts = _parts(programs, k.shape[1])
    part_out, part_lse = out, lse
    if parts > 1:
        part_out, part_lse = (q.new_empty(parts, *x.shape, dtype=torch.float32) for x in (out, lse))
    rows = _rows(q, packed > 1), _rows(k), _rows(v)
    launch(
        forward, programs * parts, *rows, lo, hi, part_out, part_lse, *_strides(*rows),
        queries, k.shape[1], heads, group, packed, lo.shape[1], _batch_stride(lo), parts, *_part_sizes(parts, out, lse),
        scale, params.softcap, DV_OUT=value_width, PACKED=packed > 1, **_meta(q, v, params), **tile.meta(),
    )  # fmt: skip
    if parts > 1:
        count = batch * queries * heads
        launch(
            merge, triton.cdiv(count, MERGE_ROWS), part_out, part_lse, out, lse, queries, heads, count, parts,
            out.numel(), lse.numel(), DV=value_width, BLOCK_M=MERGE_ROWS,
            BLOCK_N=triton.next_power_of_2(value_width),
        )  # fmt: skip
    return out, lse


def span_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None,
    params: Params,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    sign, scale, q = _positive_scale(params.scale, q)
    params = params.with_hulls(k.shape[1])._replace(scale=scale)
    meta = _meta(q, v, params)
    rows = tuple(map(_rows, (q, k, v, d_out)))
    lse = lse.contiguous()
    row_terms = torch.empty_like(lse), torch.empty_like(lse)
    _query_grad(rows, _rows(out), lse, d_lse, row_terms, d_q, params, meta)
    _key_grads(rows, row_terms, d_k, d_v, params, meta)
    return d_q if sign > 0 else d_q.mul_(sign), d_k, d_v


def _query_grad(rows, out, lse, d_lse, row_terms, d_q, params: Params, meta) -> None:
    q, k, v, _ = rows
    lo, hi, *_ = params
    batch, queries, heads, width = d_q.shape
    tile = _tile("query_grad", q, v)
    launch(
        query_grad, batch * heads * triton.cdiv(queries, tile.BLOCK_M), *rows, out, lo, hi, lse,
        lse if d_lse is None else d_lse, *row_terms, d_q, *_strides(*rows, out), queries, k.shape[1], heads,
        heads // k.shape[2], lo.shape[1], _batch_stride(lo), params.scale, params.softcap, D_OUT=width,
        LSE_GRAD=d_lse is not None, **meta, **tile.meta(),
    )  # fmt: skip


def _key_grads(rows, row_terms, d_k, d_v, params: Params, meta) -> None:
    q, _, v, _ = rows
    lo, hi, *_ = params
    batch, keys, key_heads, width = d_k.shape
    queries, group = q.shape[1], q.shape[2] // key_heads
    tile = _tile("key_grads", q, v)
    blocks = triton.cdiv(keys, tile.BLOCK_N)
    table = _key_table(params.hulls, queries, keys, blocks, tile)
    programs = batch * key_heads * blocks
    parts = _parts(programs, queries * group)
    part_k, part_v = d_k, d_v
    if parts > 1:
        part_k, part_v = (x.new_empty(parts, *x.shape, dtype=torch.float32) for x in (d_k, d_v))
    for want_k, want_v in gradient_passes(Width(q.shape[3]), Width(v.shape[3])):
        launch(
            key_grads, programs * parts, *rows, lo, hi, *row_terms, table, part_k, part_v, *_strides(*rows),
            queries, keys, key_heads, group, lo.shape[1], _batch_stride(lo), _batch_stride(table), parts,
            *_part_sizes(parts, d_k, d_v), params.scale, params.softcap, D_OUT=width, DV_OUT=d_v.shape[3],
            WANT_K=want_k, WANT_V=want_v, **meta, **tile.meta(),
        )  # fmt: skip
    if parts > 1:
        d_k.copy_(part_k.sum(0))
        d_v.copy_(part_v.sum(0))


def _key_table(hulls: Tensor, queries: int, keys: int, blocks: int, tile: Tile) -> Tensor:
    batch, runs, count, _ = hulls.shape
    table = hulls.new_empty(batch, runs, blocks, 4)
    sizes = dict(BLOCK_M=max(tile.BLOCK_M, HULL_ROWS), BLOCK_N=tile.BLOCK_N, BLOCK=TABLE_BLOCK)
    launch(key_table, batch * runs * blocks, hulls, table, count, queries, keys, **sizes)
    return table


def _positive_scale(scale: float, q: Tensor) -> tuple[float, float, Tensor]:
    """(sign, scale, q), the scale positive, as the kernels need: they scale the largest score, not every one."""
    return (1.0, scale, q) if scale > 0 else (-1.0, -scale, -q) if scale < 0 else (0.0, 1.0, q * 0.0)


def _meta(q: Tensor, v: Tensor, params: Params) -> dict[str, object]:
    """What the kernels are compiled for; see triton_device."""
    return dict(
        HEAD=Width(q.shape[3]).columns,
        VALUE=Width(v.shape[3]).columns,
        MATH=(params.softcap > 0, q.dtype == torch.float32, _triton.precision(q.dtype)),
        ONE_RUN=params.lo.shape[1] == 1,
    )


def _tile(kernel: str, q: Tensor, v: Tensor) -> Tile:
    return tile_of(kernel, _triton.family(q.device), q.dtype, Width(q.shape[3]), Width(v.shape[3]))


def _parts(programs: int, length: int) -> int:
    """Into how many parts to split the keys or queries that each program walks, from the sizes alone."""
    return max(1, min(PROGRAMS // max(programs, 1), length // SPLIT_STEP))


def _part_sizes(parts: int, *results: Tensor) -> list[int]:
    """Elements from one part of the results to the next. Few where there are parts, and 32 bits in every launch."""
    return [x.numel() if parts > 1 else 0 for x in results]


def _rows(x: Tensor, packed: bool = False) -> Tensor:
    """x as the kernels read it, (B, T, H, multiple of 8): rows at 16 bytes, tiles within 32 bits of their first row."""
    x = aligned_rows(x)
    step = max(x.stride()[1:3]) if packed else x.stride(1)
    return x if step * LARGEST_BLOCK < 2**31 else x.contiguous()


def _strides(*rows: Tensor) -> list[int]:
    return [stride // 8 for x in rows for stride in x.stride()[:3]]


def _batch_stride(x: Tensor) -> int:
    return 0 if x.shape[0] == 1 else x.stride(0)
