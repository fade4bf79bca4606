"""What the forward and the backward kernels of span attention share on the device.

A row of a head is a pair of column parts. Compile-time constants travel in tuples, which a function unpacks where it
uses them:

    HEAD, VALUE = (WIDTH, W0, W1): WIDTH numbers in memory (a multiple of 8) are held as W0 + W1 columns, powers of two:
        64 + 16 for heads of 72 and 80, where padding to 128 would cost 1.6 times the products. W1 = 0: one part.
    MATH = (CAPPED, EXACT, PRECISION): whether there is a softcap; whether the tensors are float32; how those multiply.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import dot, rounded

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, stride8, limit, ROWS: tl.constexpr, HEAD: tl.constexpr, MASKED: tl.constexpr):
    """ROWS rows from `base` on, [ROWS, W0] and [ROWS, W1], zero from column WIDTH on, and if MASKED from row `limit`.

    `base` carries the 64-bit offset; within a tile the launcher has made sure that 32 bits are enough.
    """
    WIDTH: tl.constexpr = HEAD[0]
    W0: tl.constexpr = HEAD[1]
    W1: tl.constexpr = HEAD[2]
    row = tl.arange(0, ROWS)[:, None]
    p_x = base + row * stride8 * 8
    x0 = _load_part(p_x, row, limit, 0, WIDTH, W0, MASKED)
    x1 = x0
    if W1 > 0:
        x1 = _load_part(p_x, row, limit, W0, WIDTH, W1, MASKED)
    return x0, x1


@triton.jit
def _load_part(p_x, row, limit, START: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    column = START + tl.arange(0, COLUMNS)[None, :]
    if MASKED and START + COLUMNS > WIDTH:
        return tl.load(p_x + column, mask=(row < limit) & (column < WIDTH), other=0.0)
    elif MASKED:
        return tl.load(p_x + column, mask=row < limit, other=0.0)
    elif START + COLUMNS > WIDTH:
        return tl.load(p_x + column, mask=column < WIDTH, other=0.0)
    else:
        return tl.load(p_x + column)


@triton.jit
def gather_rows(x, offset, inside, HEAD: tl.constexpr):
    """Rows at offsets of their own, [rows, W0] and [rows, W1], zero where not `inside` and from column WIDTH on.

    `x` carries what takes 64 bits: 64-bit offsets by row would lie in registers through all of a kernel.
    """
    WIDTH: tl.constexpr = HEAD[0]
    W0: tl.constexpr = HEAD[1]
    W1: tl.constexpr = HEAD[2]
    column, column1 = tl.arange(0, W0)[None, :], W0 + tl.arange(0, W1 if W1 > 0 else 16)[None, :]
    p_x = x + offset[:, None]
    x0 = tl.load(p_x + column, mask=inside[:, None] & (column < WIDTH), other=0.0)
    x1 = x0
    if W1 > 0:
        x1 = tl.load(p_x + column1, mask=inside[:, None] & (column1 < WIDTH), other=0.0)
    return x0, x1


@triton.jit
def scatter_rows(x, offset, inside, x0, x1, scale, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """Write rows of WIDTH numbers, which is HEAD's before it was rounded up, times scale, in the dtype of x."""
    W0: tl.constexpr = HEAD[1]
    W1: tl.constexpr = HEAD[2]
    dtype: tl.constexpr = x.dtype.element_ty
    column, column1 = tl.arange(0, W0)[None, :], W0 + tl.arange(0, W1 if W1 > 0 else 16)[None, :]
    p_x = x + offset[:, None]
    tl.store(p_x + column, rounded(x0 * scale, dtype), mask=inside[:, None] & (column < WIDTH))
    if W1 > 0:
        tl.store(p_x + column1, rounded(x1 * scale, dtype), mask=inside[:, None] & (column1 < WIDTH))


@triton.jit
def finite(x):
    """x with what is NaN or infinite made zero."""
    wide = x.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), wide, 0.0).to(x.dtype)


@triton.jit
def not_finite(x0, x1, HEAD: tl.constexpr):
    """For each row 0, or NaN if anything in it is NaN or infinite."""
    W1: tl.constexpr = HEAD[2]
    found = tl.sum(x0.to(tl.float32) * 0.0, 1)
    if W1 > 0:
        found += tl.sum(x1.to(tl.float32) * 0.0, 1)
    return found


@triton.jit
def product(a0, a1, b0, b1, HEAD: tl.constexpr, MATH: tl.constexpr):
    """a b^T over both column parts."""
    W1: tl.constexpr = HEAD[2]
    PRECISION: tl.constexpr = MATH[2]
    s = dot(a0, b0.T, None, PRECISION)
    if W1 > 0:
        s = dot(a1, b1.T, s, PRECISION)
    return s


@triton.jit
def scores(a0, a1, b0, b1, to_cap, HEAD: tl.constexpr, MATH: tl.constexpr):
    """a b^T, or tanh(to_cap a b^T)."""
    CAPPED: tl.constexpr = MATH[0]
    EXACT: tl.constexpr = MATH[1]
    s = product(a0, a1, b0, b1, HEAD, MATH)
    if CAPPED:
        s = tanh(s * to_cap, EXACT)
    return s


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """From exp2, which saturates as it should but cancels near 0: there x (1 + z q(z)), z = x^2, q minimax."""
    bounded = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if EXACT:
        z = x * x
        q = -0.006276387590915353
        q = q * z + 0.021116213957232587
        q = q * z - 0.053875138193131375
        q = q * z + 0.13332924006452562
        q = q * z - 0.33333330431344677
        bounded = tl.where(z < 0.36, x + x * z * q, bounded)
    return bounded


@triton.jit
def factors(scale, cap, MATH: tl.constexpr):
    """What multiplies scores before the tanh, and after it, where the logarithm becomes natural or (faster) dual."""
    CAPPED: tl.constexpr = MATH[0]
    EXACT: tl.constexpr = MATH[1]
    to_cap, factor = scale, scale
    if CAPPED:
        to_cap, factor = scale / cap, cap
    if not EXACT:
        factor *= LOG2E
    return to_cap, factor


@triton.jit
def weight(s, factor, reference, MATH: tl.constexpr):
    """exp(factor s - reference), both in the units of `factors`.

    Float32 takes natural units: the difference, which is small, is rounded, and not the reference, which is not, to
    another base. It costs a multiplication an element.
    """
    EXACT: tl.constexpr = MATH[1]
    x = s * factor - reference
    if EXACT:
        x *= LOG2E
    return tl.exp2(x)


@triton.jit
def steps(first, end, common_first, common_end, STEP: tl.constexpr, MASKED_STEP: tl.constexpr):
    """Steps through the keys [first, end): (before, within, after) those that every query sees. These are of STEP keys,
    the others of MASKED_STEP: half, since masks take registers, and at the ends less is computed in vain."""
    total = tl.cdiv(tl.maximum(end - first, 0), MASKED_STEP)
    before = tl.minimum(tl.cdiv(tl.maximum(common_first - first, 0), MASKED_STEP), total)
    start = first + before * MASKED_STEP
    within = tl.maximum(common_end - start, 0) // STEP
    return before, within, tl.cdiv(tl.maximum(end - start - within * STEP, 0), MASKED_STEP)


@triton.jit
def hull(lo, hi, inside, keys):
    """Of clamped spans [rows]: the keys that any of the rows sees, and those that all of them see."""
    seen = lo < hi
    first = tl.min(tl.where(seen, lo, keys), 0)
    end = tl.max(tl.where(seen, hi, 0), 0)
    common_first = tl.max(tl.where(inside, tl.where(seen, lo, keys), 0), 0)
    common_end = tl.min(tl.where(inside, tl.where(seen, hi, 0), keys), 0)
    return first, end, common_first, common_end


@triton.jit
def load_spans(lo, hi, offset, inside, keys):
    """Spans of some rows, clamped to the keys there are; rows that are not `inside` see nothing."""
    b_lo = tl.load(lo + offset, mask=inside, other=0)
    b_hi = tl.load(hi + offset, mask=inside, other=0)
    return tl.minimum(tl.maximum(b_lo, 0), keys), tl.minimum(tl.maximum(b_hi, 0), keys)


@triton.jit
def add_product(a, x0, x1, acc0, acc1, HEAD: tl.constexpr, MATH: tl.constexpr):
    """acc + a x, a rounded to the dtype of x."""
    W1: tl.constexpr = HEAD[2]
    PRECISION: tl.constexpr = MATH[2]
    a = rounded(a, x0.dtype)
    acc0 = dot(a, x0, acc0, PRECISION)
    if W1 > 0:
        acc1 = dot(a, x1, acc1, PRECISION)
    return acc0, acc1


@triton.jit
def zeros(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Accumulators of both column parts."""
    W0: tl.constexpr = HEAD[1]
    W1: tl.constexpr = HEAD[2]
    return tl.zeros([ROWS, W0], tl.float32), tl.zeros([ROWS, W1 if W1 > 0 else 1], tl.float32)
