"""The Triton kernels of the contrastive losses; triton.py says what they compute, and launches them.

What belongs together (SAME): 0, image i and text i + offset; 1, those of equal ids; 2, the first, and other pairs of
equal ids count nowhere. An offset that leads to no text says that none belongs together.

Statistics are (3, N) or (3, M) of float32: the maximum of q, the sum of exponentials relative to it, both without the
one positive of a row (or column), and the sum of q over its positives. Weights are (4, N) or (4, M): that maximum m, w,
v and t, with which dS = w exp(S - m), and of positives v exp(S - m) - t. What a label smoothing takes off each pair
alike is left to smoothing.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import STRIPS, dot, grouped_tile, log1p_unit, rounded, strips_of
from . import _feature_gradients

DS_SCALE = tl.constexpr(_feature_gradients.DS_SCALE)
LOWEST = tl.constexpr(-3.4e38)  # stands for no logit at all; finite, for -inf - -inf is NaN
LOG2E = tl.constexpr(1.4426950408889634)
LEAST_FACTOR = tl.constexpr(2.0**-100)

_SIZES = ["stride_i8", "stride_t8", "n", "m", "row0", "rows", "offset"]


@triton.jit
def _products(
    image, text, stride_i8, stride_t8, n, m, i0, j0, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of I T^T from row i0 and column j0, zero outside, in strips."""
    i, j, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    p_image = image + (i0 + i)[:, None].to(tl.int64) * stride_i8 * 8 + k[None, :]
    p_text = text + (j0 + j)[:, None].to(tl.int64) * stride_t8 * 8 + k[None, :]
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, D, BLOCK_K):
        inside_i, inside_j = i[:, None] < n - i0, j[:, None] < m - j0
        if D % BLOCK_K != 0:
            inside_i = inside_i & (k[None, :] < D - k0)
            inside_j = inside_j & (k[None, :] < D - k0)
        b_image = tl.load(p_image + k0, mask=inside_i, other=0.0)
        b_text = tl.load(p_text + k0, mask=inside_j, other=0.0)
        products = dot(b_image, b_text.T, products, PRECISION)
    return strips_of(products, BLOCK_M, BLOCK_N)


@triton.jit
def _sign_and_factor(scale):
    """What makes q of p, and exponents of 2 of differences of q; never 0, which would make logits of what is none."""
    scale = tl.load(scale).to(tl.float32)
    factor = tl.abs(scale) * LOG2E
    return tl.where(scale < 0, -1.0, 1.0), tl.where(factor < LEAST_FACTOR, LEAST_FACTOR, factor)


@triton.jit
def _same(image_ids, text_ids, i, j, n, m):
    """Which pairs have equal ids; what is outside has none."""
    of_image = tl.load(image_ids + i, mask=i < n, other=-1)
    of_text = tl.load(text_ids + j, mask=j < m, other=-2)
    return of_image[:, None] == of_text[None, :]


@triton.jit
def _alone(counts, i, n):
    return tl.load(counts + i, mask=i < n, other=0) == 1


@triton.jit(do_not_specialize=_SIZES)
def clip_stats(
    image, text, stride_i8, stride_t8, n, m, row0, rows, offset,
    image_ids, text_ids, image_counts, text_counts,  # [N], [M]: with SAME, and with SAME == 1
    scale,
    row_parts,  # [2, strips along a row, rows]: maximum and sum of exponentials of each row of each strip
    column_parts,  # [2, tiles along a column, M]; SAME == 1: [3, ...], both, with the sum of q over positives
    row_positive,  # [N], of which the tiles that hold an own pair write q; unless SAME == 1
    column_positive,  # [M]
    D: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr, SAME: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    end, tiles_m, tiles_n = row0 + rows, tl.cdiv(rows, BLOCK_M), tl.cdiv(m, BLOCK_N)
    tile_m, tile_n = grouped_tile(tiles_m, tiles_n, GROUP_M)
    i0, j0 = row0 + tile_m * BLOCK_M, tile_n * BLOCK_N
    strips = _products(image, text, stride_i8, stride_t8, end, m, i0, j0, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    sign, factor = _sign_and_factor(scale)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N // STRIPS)
    row_plane = tiles_n.to(tl.int64) * STRIPS * rows
    column_plane = tiles_m.to(tl.int64) * m
    p_row = row_parts + tile_n.to(tl.int64) * STRIPS * rows + (i - row0)
    p_column = column_parts + tile_m.to(tl.int64) * m + j
    for strip in tl.static_range(STRIPS):
        q = strips[strip] * sign
        own = (i + offset)[:, None] == j[None, :]
        of_row, of_column = own, own  # what stays out of a sum
        if SAME != 0:
            same = _same(image_ids, text_ids, i, j, end, m)
            if SAME == 1:
                positive = tl.where(same, q, 0.0)
                tl.store(p_row + 2 * row_plane, tl.sum(positive, 1), mask=i < end)
                tl.store(p_column + 2 * column_plane, tl.sum(positive, 0), mask=j < m)
                of_row = same & _alone(image_counts, i, end)[:, None]
                of_column = same & _alone(text_counts, j, m)[None, :]
            else:
                of_row, of_column = own | same, own | same
        if SAME != 1:
            q_ii = tl.sum(tl.where(own, q, 0.0), 1)
            start = j0 + strip * (BLOCK_N // STRIPS) - offset
            here = (i >= start) & (i < start + BLOCK_N // STRIPS) & (i < end) & (i < m - offset)
            tl.store(row_positive + i, q_ii, mask=here)
            tl.store(column_positive + (i + offset), q_ii, mask=here)
        inside = (i[:, None] < end) & (j[None, :] < m)
        of_rows = tl.where(inside & ~of_row, q, LOWEST)
        of_columns = tl.where(inside & ~of_column, q, LOWEST)
        # A NaN may escape a maximum but never a sum.
        row_max, column_max = tl.max(of_rows, 1), tl.max(of_columns, 0)
        row_sum = tl.sum(tl.exp2((of_rows - row_max[:, None]) * factor), 1)
        column_sum = tl.sum(tl.exp2((of_columns - column_max[None, :]) * factor), 0)
        tl.store(p_row, row_max, mask=i < end)
        tl.store(p_row + row_plane, row_sum, mask=i < end)
        tl.store(p_column, column_max, mask=j < m)
        tl.store(p_column + column_plane, column_sum, mask=j < m)
        j += BLOCK_N // STRIPS
        p_column += BLOCK_N // STRIPS
        p_row += rows


@triton.jit(do_not_specialize=["tiles", "length", "plane", "add"])
def fold_stats(
    parts,  # [2 or 3, tiles, length]
    stats,  # [3, length], `plane` elements from one to the next; read too if `add`
    scale, tiles, length, plane, add, SAME: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Combine the statistics over the tiles, and with what is there, in a fixed order."""
    _, factor = _sign_and_factor(scale)
    x = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    seen = (x < length) & (add != 0)
    total_max = tl.load(stats + x, mask=seen, other=LOWEST)
    total = tl.load(stats + plane + x, mask=seen, other=0.0)
    positive = tl.load(stats + 2 * plane + x, mask=seen, other=0.0)
    parts_plane = tiles.to(tl.int64) * length
    for t0 in range(0, tiles, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < tiles) & (x[None, :] < length)
        p_parts = parts + t[:, None].to(tl.int64) * length + x[None, :]
        part_max = tl.load(p_parts, mask=inside, other=LOWEST)
        part = tl.load(p_parts + parts_plane, mask=inside, other=0.0)
        new_max = tl.maximum(total_max, tl.max(part_max, 0))
        total *= tl.exp2((total_max - new_max) * factor)
        total += tl.sum(part * tl.exp2((part_max - new_max[None, :]) * factor), 0)
        total_max = new_max
        if SAME == 1:
            positive += tl.sum(tl.load(p_parts + 2 * parts_plane, mask=inside, other=0.0), 0)
    tl.store(stats + x, total_max, mask=x < length)
    tl.store(stats + plane + x, total, mask=x < length)
    if SAME == 1:
        tl.store(stats + 2 * plane + x, positive, mask=x < length)


@triton.jit
def _own_pair(stats, q_ii, i, n, inside, factor):
    """log(1 + r / a), r / (a + r) and w of rows or columns i of one positive, q_ii."""
    x = tl.load(stats + i, mask=inside, other=LOWEST)
    r = tl.load(stats + n + i, mask=inside, other=0.0)
    lead = (q_ii - x) * factor
    leads = lead >= 0  # not if NaN
    fade = tl.where(leads, tl.exp2(-lead), 1.0)
    rest = r * fade
    total = tl.where(leads, 1.0, tl.exp2(lead)) + rest
    loss = tl.log(total) - tl.where(leads, 0.0, lead / LOG2E)
    loss = tl.where(leads & (rest <= 1.0), log1p_unit(rest), loss)
    return loss, rest / total, fade / total


@triton.jit
def _weigh(stats, weights, counts, i, n, first, last, factor, share, label_smoothing, SAME: tl.constexpr):
    """(loss, mean of q over the positives) of rows or columns i, n in all, 0 of those that have no positive; and their
    weights."""
    inside = i < n
    if SAME == 1:
        number = tl.load(counts + i, mask=inside, other=0).to(tl.float32)
    else:
        number = tl.where((i >= first) & (i < last), 1.0, 0.0)
    counted = inside & (number > 0)
    mean = tl.load(stats + 2 * n + i, mask=counted, other=0.0) / tl.maximum(number, 1.0)
    loss, missed, weight = _own_pair(stats, mean, i, n, inside, factor)
    target = missed - label_smoothing
    x = tl.load(stats + i, mask=inside, other=LOWEST)
    p = weights + i
    if SAME == 1:
        several = number > 1
        r = tl.load(stats + n + i, mask=inside, other=0.0)
        loss = tl.where(several, tl.log(r) + (x - mean) * factor / LOG2E, loss)
        weight = tl.where(several, 1.0 / r, weight)
        target = tl.where(several, (1.0 - label_smoothing) / number, target)
        tl.store(p + 2 * n, tl.where(counted & several, share * weight, 0.0), mask=inside)
    tl.store(p, x, mask=inside)
    tl.store(p + n, tl.where(counted, share * weight, 0.0), mask=inside)
    tl.store(p + 3 * n, tl.where(counted, share * target, 0.0), mask=inside)
    return tl.where(counted, loss, 0.0), mean


@triton.jit(do_not_specialize=["n", "m", "offset", "first", "last"])
def clip_weights(
    row_stats, column_stats,  # [3, N], [3, M]
    image_counts, text_counts,  # [N], [M] where SAME == 1
    row_weights, column_weights,  # [4, N], [4, M], without v unless SAME == 1
    own,  # [N], dS of own pairs; unless SAME == 1
    scale,
    products,  # [2], the sums of p over the rows and over the columns that have a positive; None without smoothing
    shares,  # [3]: those of rows and columns, and the divisor; None: the three numbers that follow
    row_share, column_share, count,
    loss, n, m, offset, first, last, label_smoothing,
    SAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, so that the order is fixed."""
    _, factor = _sign_and_factor(scale)
    if shares is not None:
        row_share, column_share = tl.load(shares).to(tl.float32), tl.load(shares + 1).to(tl.float32)
        count = tl.load(shares + 2)
    total, of_means = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        losses, means = _weigh(
            row_stats, row_weights, image_counts, i, n, first, last, factor, row_share, label_smoothing, SAME
        )  # fmt: skip
        if SAME != 1:
            j = tl.where((i >= first) & (i < last), i + offset, -1)
            q_ii = tl.load(row_stats + 2 * n + i, mask=j >= 0, other=0.0)
            row_missed = _own_pair(row_stats, q_ii, i, n, j >= 0, factor)[1]
            column_missed = _own_pair(column_stats, q_ii, j, m, j >= 0, factor)[1]
            d = row_share * (label_smoothing - row_missed) + column_share * (label_smoothing - column_missed)
            tl.store(own + i, d, mask=j >= 0)
        total += row_share * losses.to(tl.float64)
        of_means += row_share * means.to(tl.float64)
    for j0 in range(0, m, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        losses, means = _weigh(
            column_stats, column_weights, text_counts, j, m, first + offset, last + offset, factor, column_share,
            label_smoothing, SAME,
        )  # fmt: skip
        total += column_share * losses.to(tl.float64)
        of_means += column_share * means.to(tl.float64)
    sum_loss = tl.sum(total, 0)
    if products is not None:
        wide = tl.load(scale).to(tl.float64)
        others = row_share * tl.load(products) / m + column_share * tl.load(products + 1) / n
        sum_loss += label_smoothing * (tl.abs(wide) * tl.sum(of_means, 0) - wide * others)
    tl.store(loss, (sum_loss / count).to(tl.float32))


@triton.jit(do_not_specialize=[*_SIZES, "stride_ds8"])
def clip_grad(
    image, text, stride_i8, stride_t8, n, m, row0, rows, offset,
    image_ids, text_ids, image_counts, text_counts, scale,
    row_weights, column_weights, own,  # as clip_weights leaves them
    ds,  # [rows, M]: dS times DS_SCALE
    sums,  # [tiles]: sum of dS (I T^T)
    stride_ds8,
    D: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr, SAME: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    end, tiles_n = row0 + rows, tl.cdiv(m, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.cdiv(rows, BLOCK_M), tiles_n, GROUP_M)
    i0, j0 = row0 + tile_m * BLOCK_M, tile_n * BLOCK_N
    strips = _products(image, text, stride_i8, stride_t8, end, m, i0, j0, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    sign, factor = _sign_and_factor(scale)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N // STRIPS)
    row_max = tl.load(row_weights + i, mask=i < end, other=0.0)
    row_weight = tl.load(row_weights + n + i, mask=i < end, other=0.0)
    p_ds = ds + (i0 - row0).to(tl.int64) * (stride_ds8 * 8) + (i - i0)[:, None] * (stride_ds8 * 8) + j[None, :]
    total = 0.0
    for strip in tl.static_range(STRIPS):
        q = strips[strip] * sign
        column_max = tl.load(column_weights + j, mask=j < m, other=0.0)
        column_weight = tl.load(column_weights + m + j, mask=j < m, other=0.0)
        if SAME == 1:
            same = _same(image_ids, text_ids, i, j, end, m)
            # above 0: a single positive, of no weight
            of_row = tl.exp2(tl.minimum((q - row_max[:, None]) * factor, 0.0))
            of_column = tl.exp2(tl.minimum((q - column_max[None, :]) * factor, 0.0))
            row_positive = tl.load(row_weights + 2 * n + i, mask=i < end, other=0.0)
            row_target = tl.load(row_weights + 3 * n + i, mask=i < end, other=0.0)
            column_positive = tl.load(column_weights + 2 * m + j, mask=j < m, other=0.0)
            column_target = tl.load(column_weights + 3 * m + j, mask=j < m, other=0.0)
            d = of_row * tl.where(same, row_positive[:, None], row_weight[:, None])
            d += of_column * tl.where(same, column_positive[None, :], column_weight[None, :])
            d -= tl.where(same, row_target[:, None] + column_target[None, :], 0.0)
        else:
            d = tl.exp2((q - row_max[:, None]) * factor) * row_weight[:, None]
            d += tl.exp2((q - column_max[None, :]) * factor) * column_weight[None, :]
            if SAME == 2:
                d = tl.where(_same(image_ids, text_ids, i, j, end, m), 0.0, d)
            if (i0 + offset < j0 + BLOCK_N) & (j0 < i0 + offset + BLOCK_M):  # held in every tile, d_ii would spill
                d_ii = tl.load(own + i, mask=i < end, other=0.0)
                d = tl.where((i + offset)[:, None] == j[None, :], d_ii[:, None], d)
        inside = (i[:, None] < end) & (j[None, :] < m)
        d = tl.where(inside, d, 0.0)
        total += tl.sum(d * strips[strip])
        tl.store(p_ds, rounded(d * DS_SCALE, ds.dtype.element_ty), mask=inside)
        j += BLOCK_N // STRIPS
        p_ds += BLOCK_N // STRIPS
    tl.store(sums + tile_m.to(tl.int64) * tiles_n + tile_n, total)


@triton.jit(do_not_specialize=[*_SIZES, "stride_ds8"])
def siglip(
    image, text, stride_i8, stride_t8, n, m, row0, rows, offset,
    image_ids, text_ids, image_counts, text_counts, scale, bias,
    ds,  # [rows, M]: dS times DS_SCALE; None where only the loss is wanted
    sums,  # [3, tiles]: loss, dS (I T^T), dS; [1, tiles] where only the loss is wanted
    stride_ds8,
    D: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr, SAME: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    end, tiles_n = row0 + rows, tl.cdiv(m, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.cdiv(rows, BLOCK_M), tiles_n, GROUP_M)
    i0, j0 = row0 + tile_m * BLOCK_M, tile_n * BLOCK_N
    strips = _products(image, text, stride_i8, stride_t8, end, m, i0, j0, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    scale, bias = tl.load(scale).to(tl.float32), tl.load(bias).to(tl.float32)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N // STRIPS)
    loss, d_scale, d_bias = 0.0, 0.0, 0.0
    for strip in tl.static_range(STRIPS):
        counted = (i[:, None] < end) & (j[None, :] < m)
        positive = (i + offset)[:, None] == j[None, :]
        if SAME == 1:
            positive = _same(image_ids, text_ids, i, j, end, m)
        elif SAME == 2:
            counted = counted & (positive | ~_same(image_ids, text_ids, i, j, end, m))
        s = strips[strip] * scale + bias
        y = tl.where(positive, -s, s)  # loss = log(1 + exp y), and d loss / dy = 1 / (1 + exp -y)
        e = tl.exp(-tl.abs(y))
        loss += tl.sum(tl.where(counted, tl.maximum(y, 0.0) + log1p_unit(e), 0.0))
        if ds is not None:
            d = tl.where(y >= 0, 1.0, e) / (1.0 + e)
            d = tl.where(counted, tl.where(positive, -d, d), 0.0)
            d_scale += tl.sum(d * strips[strip])
            d_bias += tl.sum(d)
            p_ds = ds + (i0 - row0).to(tl.int64) * (stride_ds8 * 8) + (i - i0)[:, None] * (stride_ds8 * 8) + j[None, :]
            tl.store(p_ds, rounded(d * DS_SCALE, ds.dtype.element_ty), mask=(i[:, None] < end) & (j[None, :] < m))
        j += BLOCK_N // STRIPS
    p_sums = sums + tile_m.to(tl.int64) * tiles_n + tile_n
    tl.store(p_sums, loss)
    if ds is not None:
        tl.store(p_sums + tl.num_programs(0), d_scale)
        tl.store(p_sums + 2 * tl.num_programs(0), d_bias)
