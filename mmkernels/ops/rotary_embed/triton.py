"""Rotary embedding in Triton: a row of a program is one head of one token, turned in registers.

out_a = a c_a - b s_a,  out_b = b c_b + a s_b,   or transposed, the same with -s_b for s_a and -s_a for s_b
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
    return _triton.unsupported("x", x)


def rotary_embed(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    batch, tokens, heads, dim = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x = aligned_rows(x)
    strides = [stride // 8 if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    width = max(16, triton.next_power_of_2(dim // 2))
    block = max(1, NUMBERS // (2 * width))
    rows, table_tokens = batch * tokens * heads, tokens if len(cos) > 1 else 0
    launch(
        rotate, triton.cdiv(rows, block), x, cos, sin, out, *strides, rows, tokens, heads, table_tokens,
        DIM=dim, WIDTH=width, BLOCK_M=block, TRANSPOSED=transposed, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["stride_b8", "stride_t8", "stride_h8", "rows", "tokens", "heads", "table_tokens"])
def rotate(
    x,  # [B, T, H, D], strides in units of 8 numbers
    cos, sin,  # [B or 1, T, D]
    out,  # [B, T, H, D]
    stride_b8, stride_t8, stride_h8, rows, tokens, heads, table_tokens,  # 0: one table for the whole batch
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, token, batch = row % heads, row // heads % tokens, row // heads // tokens
    column = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows)[:, None] & (column < HALF)
    p_x = x + (batch * stride_b8 + token * stride_t8 + head * stride_h8)[:, None] * 8 + column
    table = ((batch * table_tokens + token) * DIM)[:, None] + column
    a = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(p_x + HALF, mask=mask, other=0.0).to(tl.float32)
    cos_a, cos_b = tl.load(cos + table, mask=mask, other=0.0), tl.load(cos + table + HALF, mask=mask, other=0.0)
    sin_a, sin_b = tl.load(sin + table, mask=mask, other=0.0), tl.load(sin + table + HALF, mask=mask, other=0.0)
    if TRANSPOSED:
        sin_a, sin_b = -sin_b, -sin_a
    p_out = out + (row * DIM)[:, None] + column
    dtype = out.dtype.element_ty
    tl.store(p_out, rounded(a * cos_a - b * sin_a, dtype), mask=mask)
    tl.store(p_out + HALF, rounded(b * cos_b + a * sin_b, dtype), mask=mask)
