"""The contrastive losses in Triton: no N x N matrix, any scale, features of any length, the same bits in every run.

CLIP, with p = I T^T, q = p or -p by the sign of the scale s, f = |s| / ln 2, m and r the maximum of q and the sum of
2^(f (q - m)) over a row without its diagonal, m' and r' over a column, e the smoothing:

    g_i = f (q_ii - m_i),  a_i = 2^min(g_i, 0),  r_i falls to r_i 2^-max(g_i, 0),  the same for a column
    loss  = 1/2N sum_i [log(1 + r_i / a_i) + log(1 + r'_i / a'_i)] + e s/N [sum_i p_ii - (sum I)(sum T) / N]
    dS_ij = [2^(f (q_ij - m_i)) w_i + 2^(f (q_ij - m'_j)) w'_j - e/N] / N,   w_i = 2^-max(g_i, 0) / 2 (a_i + r_i)
    dS_ii = [e (1 - 1/N) - (r_i / (a_i + r_i) + r'_i / (a'_i + r'_i)) / 2] / N
    dI = s dS T,  dT = s dS^T I,  ds = sum dS p

Pass 1 (`clip_stats`) computes the tiles of p and leaves a (maximum, sum) pair for each row and each column of every
strip of a tile; `fold_stats` combines them in a fixed order, and `clip_loss_sum` makes the loss, the weights w and the
dS_ii of them. Why an online maximum and not the fixed offset that unit-length features allow: it costs one more
exponential an element, a few percent of the products' time, and is right for every scale and length, with no guard and
no second try. The diagonal is kept out of the sums because a small loss, and what a probability is short of 1, would
drown in the rounding of its 1. The maximum is subtracted before the scale is applied: the difference of products that
are close is exact, and nothing is left for the compiler to fuse in one pass and not in the other (a rounded logit of
100 is wrong by 4e-6). The sum of all logits, for the smoothing, needs no pass: it is a product of sums, subtracted in
float64.

Pass 2 (`clip_grad`) recomputes the tiles and writes dS for a chunk of rows, which two matrix products of the vendor's
library turn into dI and into a float32 sum for dT. A flash-style backward would keep a float32 accumulator of tile x D
in registers, and D is 512 to 1024 here. So 8 N^2 D operations in all: 2 for S, 2 for S again, 4 for the gradients.
dS is stored without its 1/N and times 2^15 (|N dS| <= 1), or float16 would lose the small probabilities.

SigLIP, with x = z (s I T^T + b), z = 2 eye - 1, needs no normaliser, so one pass gives loss and dS, 6 N^2 D operations:

    loss = 1/N sum_ij log(1 + exp(-x_ij)),   dS = -z / (1 + exp(x)) / N,   db = sum dS

Memory moved beyond the operands: 8 N^2 (1/BLOCK_M + STRIPS/BLOCK_N) bytes of partials, 6 N^2 bytes of dS in half types.
Memory held: O(N D), and a workspace of WORKSPACE bytes, whatever N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._aligned_rows import aligned_rows
from .._triton import STRIPS, Tile, dot, grouped_tile, launch, log1p_unit, rounded, strips_of
from . import _feature_gradients
from ._feature_gradients import feature_gradients

# Bytes for the rows of dS, or of the partials, in work at a time. Small when interpreted, so that tests walk chunks.
WORKSPACE = 2**10 if _triton.INTERPRET.value else 2**28
GROUP_M = 8
DS_SCALE = tl.constexpr(_feature_gradients.DS_SCALE)
LOWEST = tl.constexpr(-3.4e38)  # stands for no logit at all; finite, for -inf - -inf is NaN
LOG2E = tl.constexpr(1.4426950408889634)
FOLD = dict(BLOCK_T=16, BLOCK_L=128)
LOSS_BLOCK = 1024

# By architecture: CLIP's and SigLIP's tile for half types, and the one for float32. None spills a register and all fit
# into shared memory (tests/compile); on sm90 CLIP's leaves room for two blocks, one computing products while the other
# takes exponentials, and SigLIP's, which does not fit twice, is wide instead.
TILES = {
    "interpreter": (Tile(32, 64, 32, 4, 1), Tile(32, 64, 32, 4, 1), Tile(32, 64, 32, 4, 1)),
    "sm80": (Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 128, 16, 8, 3)),
    "sm90": (Tile(128, 128, 64, 8, 3, maxnreg=128), Tile(128, 256, 64, 8, 3), Tile(128, 128, 16, 8, 3)),
    "sm100": (Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 128, 16, 8, 3)),
    "cdna": (Tile(128, 128, 64, 8, 2), Tile(128, 128, 64, 8, 2), Tile(128, 64, 32, 8, 2)),
}
CLIP, SIGLIP = 0, 1


def unsupported(image: Tensor, text: Tensor) -> str | None:
    return _triton.unsupported_tensor("image_features", image) or _triton.unsupported_tensor("text_features", text)


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float) -> Tensor:
    image, text = aligned_rows(image), aligned_rows(text)
    return _clip_loss(image, text, scale, label_smoothing, *_clip_stats(image, text, scale))


def clip_loss_with_grads(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    n, width = image.shape
    image, text = aligned_rows(image), aligned_rows(text)
    row_stats, column_stats, diagonal = _clip_stats(image, text, scale)
    loss = _clip_loss(image, text, scale, label_smoothing, row_stats, column_stats, diagonal)
    tile = _tile(image, CLIP)

    def write_rows(ds: Tensor, sums: Tensor, row0: int, rows: int) -> None:
        args = row_stats, column_stats, diagonal, ds, sums, ds.stride(0) // 8, label_smoothing / n
        _launch_tiles(clip_grad, tile, image, text, row0, rows, scale, *args)

    d_image, d_text, sums = _gradients(write_rows, 1, tile, image, text, scale, width)
    return loss, d_image, d_text, _mean_like(sums[0], n, scale)


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    image, text = aligned_rows(image), aligned_rows(text)
    n, tile = len(image), _tile(image, SIGLIP)
    total = torch.zeros((), dtype=torch.float64, device=image.device)
    for row0, rows in _chunks(n, 4 * triton.cdiv(n, tile.BLOCK_N), tile.BLOCK_M):
        sums = image.new_empty(_tiles(rows, n, tile), dtype=torch.float32)
        _launch_tiles(siglip, tile, image, text, row0, rows, scale, bias, None, sums, 0)
        total += sums.sum(dtype=torch.float64)
    return (total / n).float()


def siglip_loss_with_grads(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    n, width = image.shape
    image, text = aligned_rows(image), aligned_rows(text)
    tile = _tile(image, SIGLIP)

    def write_rows(ds: Tensor, sums: Tensor, row0: int, rows: int) -> None:
        _launch_tiles(siglip, tile, image, text, row0, rows, scale, bias, ds, sums, ds.stride(0) // 8)

    d_image, d_text, sums = _gradients(write_rows, 3, tile, image, text, scale, width)
    d_scale, d_bias = _mean_like(sums[1], n, scale), _mean_like(sums[2], n, bias)
    return (sums[0] / n).float(), d_image, d_text, d_scale, d_bias


def _clip_stats(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, sum of exponentials) of each row and of each column without the diagonal, (2, N) each, and that."""
    n, tile = len(image), _tile(image, CLIP)
    row_stats, column_stats = (image.new_empty(2, n, dtype=torch.float32) for _ in range(2))
    diagonal = image.new_empty(n, dtype=torch.float32)
    tiles_n = triton.cdiv(n, tile.BLOCK_N)
    for row0, rows in _chunks(n, 8 * (STRIPS.value * tiles_n + n // tile.BLOCK_M), tile.BLOCK_M):
        tiles_m = triton.cdiv(rows, tile.BLOCK_M)
        row_parts = image.new_empty(2, STRIPS.value * tiles_n, rows, dtype=torch.float32)
        column_parts = image.new_empty(2, tiles_m, n, dtype=torch.float32)
        _launch_tiles(clip_stats, tile, image, text, row0, rows, scale, row_parts, column_parts, diagonal)
        _fold(row_parts, row_stats[:, row0 : row0 + rows], scale, first=True)
        _fold(column_parts, column_stats, scale, first=row0 == 0)
    return row_stats, column_stats, diagonal


def _fold(parts: Tensor, stats: Tensor, scale: Tensor, first: bool) -> None:
    _, tiles, length = parts.shape
    programs = triton.cdiv(length, FOLD["BLOCK_L"])
    launch(fold_stats, programs, parts, stats, scale, tiles, length, stats.stride(0), int(first), **FOLD)


def _clip_loss(image, text, scale, label_smoothing, row_stats, column_stats, diagonal) -> Tensor:
    """The loss. The sums of exponentials become the weights w, the diagonal that of N dS."""
    loss, products = image.new_empty((), dtype=torch.float32), None
    if label_smoothing != 0.0:
        products = image.sum(0, dtype=torch.float64) @ text.sum(0, dtype=torch.float64)
    args = row_stats, column_stats, diagonal, scale, products, loss, len(image), label_smoothing
    launch(clip_loss_sum, 1, *args, BLOCK=LOSS_BLOCK)
    return loss


def _gradients(
    write_rows: Callable[[Tensor, Tensor, int, int], None],
    num_sums: int,
    tile: Tile,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both features, `width` columns of them, and the totals of the sums that each tile leaves.

    write_rows(ds, sums, row0, rows) writes the rows of N dS from row0 on, times DS_SCALE, and its tiles' sums.
    """
    n = len(image)
    totals = torch.zeros(num_sums, dtype=torch.float64, device=image.device)

    def write_and_add(ds: Tensor, row0: int) -> None:
        sums = image.new_empty(num_sums, _tiles(len(ds), n, tile), dtype=torch.float32)
        write_rows(ds, sums, row0, len(ds))
        totals.add_(sums.sum(1, dtype=torch.float64))

    step = _rows_at_once(-(-n // 8) * 8 * image.element_size(), tile.BLOCK_M)
    return *feature_gradients(write_and_add, image, text, scale, width, step), totals


def _launch_tiles(kernel, tile: Tile, image: Tensor, text: Tensor, row0: int, rows: int, *args) -> None:
    """One program for each tile of the rows [row0, row0 + rows) of S."""
    n, width = image.shape
    meta = dict(D=width, PRECISION=_triton.precision(image.dtype), GROUP_M=GROUP_M, **tile.meta())
    strides = image.stride(0) // 8, text.stride(0) // 8
    launch(kernel, _tiles(rows, n, tile), image, text, *strides, n, row0, rows, *args, **meta)


def _tile(features: Tensor, loss: int) -> Tile:
    return TILES[_triton.family(features.device)][2 if features.dtype == torch.float32 else loss]


def _tiles(rows: int, n: int, tile: Tile) -> int:
    return triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N)


def _chunks(n: int, bytes_per_row: int, block: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the chunks that fit into the workspace, of whole tiles but for the last one."""
    step = _rows_at_once(bytes_per_row, block)
    for row0 in range(0, n, step):
        yield row0, min(step, n - row0)


def _rows_at_once(bytes_per_row: int, block: int) -> int:
    return max(WORKSPACE // bytes_per_row // block, 1) * block


def _mean_like(total: Tensor, n: int, parameter: Tensor) -> Tensor:
    return (total / n).to(torch.promote_types(parameter.dtype, torch.float32)).reshape(parameter.shape)


@triton.jit
def _products(
    image, text, stride_i8, stride_t8, n, i0, j0, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of I T^T from row i0 and column j0, zero outside, in strips."""
    i, j, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    p_image = image + (i0 + i)[:, None].to(tl.int64) * stride_i8 * 8 + k[None, :]
    p_text = text + (j0 + j)[:, None].to(tl.int64) * stride_t8 * 8 + k[None, :]
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, D, BLOCK_K):
        inside_i, inside_j = i[:, None] < n - i0, j[:, None] < n - j0
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
    return tl.where(scale < 0, -1.0, 1.0), tl.where(factor < 2.0**-100, 2.0**-100, factor)


@triton.jit(do_not_specialize=["stride_i8", "stride_t8", "n", "row0", "rows"])
def clip_stats(
    image, text, stride_i8, stride_t8, n, row0, rows, scale,
    row_parts,  # [2, strips along a row, rows]: maximum and sum of exponentials of each row of each strip
    column_parts,  # [2, tiles along a column, N]
    diagonal,  # [N], of q
    D: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tile_m, tile_n = grouped_tile(tiles_m, tiles_n, GROUP_M)
    i0, j0 = row0 + tile_m * BLOCK_M, tile_n * BLOCK_N
    strips = _products(image, text, stride_i8, stride_t8, n, i0, j0, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    sign, factor = _sign_and_factor(scale)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N // STRIPS)
    p_row = row_parts + tile_n.to(tl.int64) * STRIPS * rows + (i - row0)
    p_column = column_parts + tile_m.to(tl.int64) * n + j
    for strip in tl.static_range(STRIPS):
        own = i[:, None] == j[None, :]
        q = strips[strip] * sign
        q_ii = tl.sum(tl.where(own, q, 0.0), 1)
        q = tl.where((i[:, None] < n) & (j[None, :] < n) & ~own, q, LOWEST)
        # A NaN may escape a maximum but never a sum.
        row_max, column_max = tl.max(q, 1), tl.max(q, 0)
        row_sum = tl.sum(tl.exp2((q - row_max[:, None]) * factor), 1)
        column_sum = tl.sum(tl.exp2((q - column_max[None, :]) * factor), 0)
        tl.store(p_row, row_max, mask=i < n)
        tl.store(p_row + tiles_n.to(tl.int64) * STRIPS * rows, row_sum, mask=i < n)
        tl.store(p_column, column_max, mask=j < n)
        tl.store(p_column + tiles_m.to(tl.int64) * n, column_sum, mask=j < n)
        first = j0 + strip * (BLOCK_N // STRIPS)
        tl.store(diagonal + i, q_ii, mask=(i < n) & (i >= first) & (i < first + BLOCK_N // STRIPS))
        j += BLOCK_N // STRIPS
        p_column += BLOCK_N // STRIPS
        p_row += rows


@triton.jit(do_not_specialize=["tiles", "length", "plane", "first"])
def fold_stats(
    parts,  # [2, tiles, length]
    stats,  # [2, length], `plane` elements between maximum and sum; read too unless this is the first fold
    scale, tiles, length, plane, first,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Combine (maximum, sum) pairs over the tiles, and with what `stats` holds, in a fixed order."""
    _, factor = _sign_and_factor(scale)
    x = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    seen = (x < length) & (first == 0)
    total_max = tl.load(stats + x, mask=seen, other=LOWEST)
    total = tl.load(stats + plane + x, mask=seen, other=0.0)
    for t0 in range(0, tiles, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < tiles) & (x[None, :] < length)
        p_parts = parts + t[:, None].to(tl.int64) * length + x[None, :]
        part_max = tl.load(p_parts, mask=inside, other=LOWEST)
        part = tl.load(p_parts + tiles.to(tl.int64) * length, mask=inside, other=0.0)
        new_max = tl.maximum(total_max, tl.max(part_max, 0))
        total *= tl.exp2((total_max - new_max) * factor)
        total += tl.sum(part * tl.exp2((part_max - new_max[None, :]) * factor), 0)
        total_max = new_max
    tl.store(stats + x, total_max, mask=x < length)
    tl.store(stats + plane + x, total, mask=x < length)


@triton.jit
def _own_pair(stats, q_ii, n, i, factor):
    """log(1 + r / a), r / (a + r) and w of rows or columns i; of none, beyond the last, the first two are 0."""
    x = tl.load(stats + i, mask=i < n, other=LOWEST)
    r = tl.load(stats + n + i, mask=i < n, other=0.0)
    lead = (q_ii - x) * factor
    leads = lead >= 0  # not if NaN
    fade = tl.where(leads, tl.exp2(-lead), 1.0)
    rest = r * fade
    total = tl.where(leads, 1.0, tl.exp2(lead)) + rest
    loss = tl.log(total) - tl.where(leads, 0.0, lead / LOG2E)
    loss = tl.where(leads & (rest <= 1.0), log1p_unit(rest), loss)
    return loss, rest / total, 0.5 * fade / total


@triton.jit(do_not_specialize=["n"])
def clip_loss_sum(
    row_stats,  # [2, N], of which the sums become the weights w
    column_stats,
    diagonal,  # [N], of q; becomes that of N dS
    scale,
    products,  # the sum of p; None without smoothing
    loss, n, label_smoothing, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, so that the order is fixed."""
    _, factor = _sign_and_factor(scale)
    total, own = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        q_ii = tl.load(diagonal + i, mask=i < n, other=0.0)
        row_loss, row_missed, row_weight = _own_pair(row_stats, q_ii, n, i, factor)
        column_loss, column_missed, column_weight = _own_pair(column_stats, q_ii, n, i, factor)
        total += (0.5 * (row_loss + column_loss)).to(tl.float64)
        own += q_ii.to(tl.float64)
        d = label_smoothing * (1.0 - 1.0 / n) - 0.5 * (row_missed + column_missed)
        tl.store(diagonal + i, d, mask=i < n)
        tl.store(row_stats + n + i, row_weight, mask=i < n)
        tl.store(column_stats + n + i, column_weight, mask=i < n)
    sum_loss = tl.sum(total, 0)
    if products is not None:
        wide = tl.load(scale).to(tl.float64)
        sum_loss += label_smoothing * (tl.abs(wide) * tl.sum(own, 0) - wide * (tl.load(products) / n))
    tl.store(loss, (sum_loss / n).to(tl.float32))


@triton.jit(do_not_specialize=["stride_i8", "stride_t8", "n", "row0", "rows", "stride_ds8"])
def clip_grad(
    image, text, stride_i8, stride_t8, n, row0, rows, scale,
    row_stats, column_stats, diagonal,  # as clip_loss_sum leaves them
    ds,  # [rows, N]: N dS times DS_SCALE
    sums,  # [tiles]: sum of N dS (I T^T)
    stride_ds8, off_target,
    D: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.cdiv(rows, BLOCK_M), tiles_n, GROUP_M)
    i0, j0 = row0 + tile_m * BLOCK_M, tile_n * BLOCK_N
    strips = _products(image, text, stride_i8, stride_t8, n, i0, j0, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    sign, factor = _sign_and_factor(scale)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N // STRIPS)
    row_max = tl.load(row_stats + i, mask=i < n, other=0.0)
    row_weight = tl.load(row_stats + n + i, mask=i < n, other=0.0)
    p_ds = ds + (i0 - row0).to(tl.int64) * (stride_ds8 * 8) + (i - i0)[:, None] * (stride_ds8 * 8) + j[None, :]
    total = 0.0
    for strip in tl.static_range(STRIPS):
        q = strips[strip] * sign
        column_max = tl.load(column_stats + j, mask=j < n, other=0.0)
        column_weight = tl.load(column_stats + n + j, mask=j < n, other=0.0)
        d = tl.exp2((q - row_max[:, None]) * factor) * row_weight[:, None]
        d += tl.exp2((q - column_max[None, :]) * factor) * column_weight[None, :]
        d -= off_target
        if (i0 < j0 + BLOCK_N) & (j0 < i0 + BLOCK_M):  # held in every tile, d_ii would spill
            d_ii = tl.load(diagonal + i, mask=i < n, other=0.0)
            d = tl.where(i[:, None] == j[None, :], d_ii[:, None], d)
        inside = (i[:, None] < n) & (j[None, :] < n)
        d = tl.where(inside, d, 0.0)
        total += tl.sum(d * strips[strip])
        tl.store(p_ds, rounded(d * DS_SCALE, ds.dtype.element_ty), mask=inside)
        j += BLOCK_N // STRIPS
        p_ds += BLOCK_N // STRIPS
    tl.store(sums + tile_m.to(tl.int64) * tiles_n + tile_n, total)


@triton.jit(do_not_specialize=["stride_i8", "stride_t8", "n", "row0", "rows", "stride_ds8"])
def siglip(
    image, text, stride_i8, stride_t8, n, row0, rows, scale, bias,
    ds,  # [rows, N]: N dS times DS_SCALE; None where only the loss is wanted
    sums,  # [3, tiles]: loss, N dS (I T^T), N dS; [1, tiles] where only the loss is wanted
    stride_ds8,
    D: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.cdiv(rows, BLOCK_M), tiles_n, GROUP_M)
    i0, j0 = row0 + tile_m * BLOCK_M, tile_n * BLOCK_N
    strips = _products(image, text, stride_i8, stride_t8, n, i0, j0, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    scale, bias = tl.load(scale).to(tl.float32), tl.load(bias).to(tl.float32)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N // STRIPS)
    loss, d_scale, d_bias = 0.0, 0.0, 0.0
    for strip in tl.static_range(STRIPS):
        inside = (i[:, None] < n) & (j[None, :] < n)
        positive = i[:, None] == j[None, :]
        s = strips[strip] * scale + bias
        y = tl.where(positive, -s, s)  # loss = log(1 + exp y), and d loss / dy = 1 / (1 + exp -y)
        e = tl.exp(-tl.abs(y))
        loss += tl.sum(tl.where(inside, tl.maximum(y, 0.0) + log1p_unit(e), 0.0))
        if ds is not None:
            d = tl.where(y >= 0, 1.0, e) / (1.0 + e)
            d = tl.where(inside, tl.where(positive, -d, d), 0.0)
            d_scale += tl.sum(d * strips[strip])
            d_bias += tl.sum(d)
            p_ds = ds + (i0 - row0).to(tl.int64) * (stride_ds8 * 8) + (i - i0)[:, None] * (stride_ds8 * 8) + j[None, :]
            tl.store(p_ds, rounded(d * DS_SCALE, ds.dtype.element_ty), mask=inside)
        j += BLOCK_N // STRIPS
    p_sums = sums + tile_m.to(tl.int64) * tiles_n + tile_n
    tl.store(p_sums, loss)
    if ds is not None:
        tl.store(p_sums + tl.num_programs(0), d_scale)
        tl.store(p_sums + 2 * tl.num_programs(0), d_bias)
