"""Rotary embedding in Triton: a row of a program is one head of one token, turned in registers.

out_a = a c_a - b s_a,  out_b = b c_b + a s_b,   or transposed, the same with -s_b for s_a and -s_a for s_b

for the halves a and b of a head, or interleaved, its even and its odd numbers, which are read and written together and
parted in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._aligned_rows import aligned_rows
from .._triton import launch, rounded

NUMBERS = 4096  # of a program


def unsupported(x: Tensor) -> str | None:
    return _triton.unsupported_tensor("x", x)


def rotary_embed(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    batch, tokens, heads, dim = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x = aligned_rows(x)
    strides = [stride // 8 if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    width = max(16, triton.next_power_of_2(dim // 2))
    block = max(1, NUMBERS // (2 * width))
    rows, table_tokens = batch * tokens * heads, tokens if len(cos) > 1 else 0
    launch(
        rotate, triton.cdiv(rows, block), x, cos, sin, out, *strides, rows, tokens, heads, table_tokens,
        DIM=dim, WIDTH=width, BLOCK_M=block, INTERLEAVED=interleaved,
        TRANSPOSED=transposed, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["stride_b8", "stride_t8", "stride_h8", "rows", "tokens", "heads", "table_tokens"])
def rotate(
    x,  # [B, T, H, D], strides in units of 8 numbers
    cos, sin,  # [B or 1, T, D]
    out,  # [B, T, H, D]
    stride_b8, stride_t8, stride_h8, rows, tokens, heads, table_tokens,  # 0: one table for the whole batch
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, token, batch = row % heads, row // heads % tokens, row // heads // tokens
    inside = row < rows
    p_x = x + (batch * stride_b8 + token * stride_t8 + head * stride_h8) * 8
    table = (batch * table_tokens + token) * DIM
    a, b = _load_pairs(p_x, inside, DIM, WIDTH, INTERLEAVED)
    cos_a, cos_b = _load_pairs(cos + table, inside, DIM, WIDTH, INTERLEAVED)
    sin_a, sin_b = _load_pairs(sin + table, inside, DIM, WIDTH, INTERLEAVED)
    if TRANSPOSED:
        sin_a, sin_b = -sin_b, -sin_a
    out_a, out_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    p_out = out + row * DIM
    dtype = out.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        numbers = rounded(tl.interleave(out_a, out_b), dtype)
        tl.store(p_out[:, None] + column, numbers, mask=inside[:, None] & (column < DIM))
    else:
        column = tl.arange(0, WIDTH)[None, :]
        mask = inside[:, None] & (column < DIM // 2)
        tl.store(p_out[:, None] + column, rounded(out_a, dtype), mask=mask)
        tl.store(p_out[:, None] + DIM // 2 + column, rounded(out_b, dtype), mask=mask)


@triton.jit
def _load_pairs(p, inside, DIM: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rows of DIM numbers, which begin at p [BLOCK_M], as a and b, [BLOCK_M, WIDTH] in float32."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        numbers = tl.load(p[:, None] + column, mask=inside[:, None] & (column < DIM), other=0.0).to(tl.float32)
        return tl.split(numbers.reshape(numbers.shape[0], WIDTH, 2))
    else:
        column = tl.arange(0, WIDTH)[None, :]
        mask = inside[:, None] & (column < DIM // 2)
        a = tl.load(p[:, None] + column, mask=mask, other=0.0)
        b = tl.load(p[:, None] + DIM // 2 + column, mask=mask, other=0.0)
        return a.to(tl.float32), b.to(tl.float32)
