"""The largest inner products in Triton. Signatures and results are those of `reference.py`.

row_maxima: a program has a block of rows and one segment, and keeps of each row the largest product and its column
while the columns of the segment pass in blocks. gather: a program has a block of rows and of their numbers, and meets
the segments. scatter: weights are sorted by their index first, steadily, so that a program can add up the rows of one
target in their order: what comes out is the same in every run, with no atomic addition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._aligned_rows import aligned_rows
from .._triton import dot, launch, precision

NONE = tl.constexpr(2**31 - 1)  # no column


def unsupported(rows: Tensor, columns: Tensor) -> str | None:
    return _triton.unsupported_tensor("rows", rows) or _triton.unsupported_tensor("columns", columns)


def row_maxima(rows: Tensor, columns: Tensor, bias: Tensor | None, starts: Tensor) -> tuple[Tensor, Tensor]:
    shape = len(rows), len(starts) - 1
    maxima = rows.new_empty(shape, dtype=torch.float32)
    indices = rows.new_empty(shape, dtype=torch.int32)
    rows, columns = aligned_rows(rows), aligned_rows(columns)
    starts = starts.clamp(0, len(columns)).cummax(0).values.contiguous()
    width = rows.shape[1]
    side = 32 if rows.dtype == torch.float32 else 64  # exact products of 64 x 64 spill registers
    meta = {"BLOCK_M": side, "BLOCK_N": side, "BLOCK_K": min(side, max(16, triton.next_power_of_2(width)))}
    blocks = triton.cdiv(len(rows), meta["BLOCK_M"])
    launch(
        find_maxima, blocks * shape[1], rows, columns, bias if bias is None else bias.contiguous(), starts, maxima,
        indices, _stride(rows), _stride(columns), len(rows), blocks, shape[1], width, PRECISION=precision(rows.dtype),
        **meta, num_warps=4, num_stages=3,
    )  # fmt: skip
    return maxima, indices


def gather(weights: Tensor, columns: Tensor, indices: Tensor) -> Tensor:
    sums = weights.new_empty(len(weights), columns.shape[1])
    columns, block, width = aligned_rows(columns), 16, _width(sums)
    rows, parts = triton.cdiv(len(weights), block), triton.cdiv(sums.shape[1], width)
    launch(
        gather_columns, rows * parts, weights.contiguous(), indices.contiguous(), columns, sums, _stride(columns),
        *weights.shape, len(columns), sums.shape[1], parts, BLOCK_M=block, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return sums


def scatter(weights: Tensor, rows: Tensor, indices: Tensor, count: int) -> Tensor:
    sums = weights.new_empty(count, rows.shape[1])
    rows = aligned_rows(rows)
    sorted_indices, order = indices.reshape(-1).sort(stable=True)
    targets = torch.arange(count + 1, dtype=torch.int32, device=rows.device)
    starts = torch.searchsorted(sorted_indices.contiguous(), targets, out_int32=True)
    width = _width(sums)
    parts = triton.cdiv(sums.shape[1], width)
    launch(
        scatter_rows, count * parts, weights.contiguous(), order, starts, rows, sums, _stride(rows), weights.shape[1],
        sums.shape[1], parts, WIDTH=width, num_warps=1,
    )  # fmt: skip
    return sums


def _width(sums: Tensor) -> int:
    """Numbers of a row that a program adds up."""
    return min(128, max(16, triton.next_power_of_2(sums.shape[1])))


def _stride(x: Tensor) -> int:
    """Between rows, in units of 8 numbers."""
    return x.stride(0) // 8 if len(x) > 1 else 0


@triton.jit(do_not_specialize=["stride_a8", "stride_b8", "rows", "blocks", "segments", "dim"])
def find_maxima(
    a, b,  # [R, D], [C, D], strides in units of 8 numbers
    bias,  # [C] or None
    starts,  # [S + 1], rising, in [0, C]
    maxima, indices,  # [R, S]
    stride_a8, stride_b8, rows, blocks, segments, dim,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    segment, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    number = tl.arange(0, BLOCK_K)  # [BK]
    p_a = a + row[:, None] * (stride_a8 * 8) + number  # [BM, BK]
    found = tl.full([BLOCK_M], -float("inf"), tl.float32)
    where = tl.full([BLOCK_M], NONE, tl.int32)
    for start in range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)  # [BN]
        p_b = b + column[None, :].to(tl.int64) * (stride_b8 * 8) + number[:, None]  # [BK, BN]
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, dim, BLOCK_K):
            left = tl.load(p_a + k, mask=(row[:, None] < rows) & (number + k < dim), other=0.0)
            right = tl.load(p_b + k, mask=(column[None, :] < last) & (number[:, None] + k < dim), other=0.0)
            products = dot(left, right, products, PRECISION)
        if bias is not None:
            products += tl.load(bias + column, mask=column < last, other=0.0)[None, :]
        found, where = _larger(products, column, last, found, where)
    p_out = row * segments + segment
    tl.store(maxima + p_out, found, mask=row < rows)
    tl.store(indices + p_out, tl.where(where == NONE, -1, where), mask=row < rows)


@triton.jit
def _larger(products, column, last, found, where):
    """What was found, or a product of these columns that is larger, NaN being the largest and the first winning."""
    is_nan = (products != products) & (column < last)[None, :]
    seen = tl.where((column < last)[None, :], tl.where(is_nan, float("inf"), products), -float("inf"))
    largest = tl.max(seen, 1)  # [BM]
    nans = tl.max(is_nan.to(tl.int32), 1) > 0
    hit = tl.where(nans[:, None], is_nan, (seen == largest[:, None]) & (column < last)[None, :])
    place = tl.min(tl.where(hit, column[None, :], NONE), 1)
    takes = (found == found) & (nans | (largest > found) | (where == NONE))
    return tl.where(takes, tl.where(nans, float("nan"), largest), found), tl.where(takes, place, where)


@triton.jit(do_not_specialize=["stride8", "rows", "segments", "columns", "dim", "parts"])
def gather_columns(
    weights, indices,  # [R, S]
    table,  # [C, D], the stride in units of 8 numbers
    sums,  # [R, D]
    stride8, rows, segments, columns, dim, parts,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    number = part * WIDTH + tl.arange(0, WIDTH)  # [W]
    total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for segment in range(0, segments):
        weight = tl.load(weights + row * segments + segment, mask=row < rows, other=0.0)
        index = tl.load(indices + row * segments + segment, mask=row < rows, other=-1)
        known = (index >= 0) & (index < columns)
        place = table + index[:, None].to(tl.int64) * (stride8 * 8) + number
        value = tl.load(place, mask=known[:, None] & (number < dim), other=0.0).to(tl.float32)
        total += tl.where(known[:, None], weight[:, None] * value, 0.0)
    tl.store(sums + row[:, None] * dim + number, total, mask=(row[:, None] < rows) & (number < dim))


@triton.jit(do_not_specialize=["stride8", "segments", "dim", "parts"])
def scatter_rows(
    weights,  # [R, S]
    order,  # [R S], places of weights by the index of each
    starts,  # [targets + 1], where in that order each target's begin
    table,  # [R, D], the stride in units of 8 numbers
    sums,  # [targets, D]
    stride8, segments, dim, parts,
    WIDTH: tl.constexpr,
):  # fmt: skip
    target, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    number = part * WIDTH + tl.arange(0, WIDTH)  # [W]
    total = tl.zeros([WIDTH], tl.float32)
    for i in range(tl.load(starts + target), tl.load(starts + target + 1)):
        place = tl.load(order + i)
        row = table + (place // segments) * (stride8 * 8) + number
        total += tl.load(weights + place) * tl.load(row, mask=number < dim, other=0.0).to(tl.float32)
    tl.store(sums + target.to(tl.int64) * dim + number, total, mask=number < dim)
