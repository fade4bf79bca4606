"""The contrastive losses in Triton: no N x M matrix, any scale, features of any length, the same bits in every run.

CLIP, of N pairs (weights.py has what else may belong together), with p = I T^T, q = p or -p by the sign of the scale
s, f = |s| / ln 2, m and r the maximum of q and the sum of 2^(f (q - m)) over a row without its diagonal, m' and r' over
a column, e the smoothing:

    g_i = f (q_ii - m_i),  a_i = 2^min(g_i, 0),  r_i falls to r_i 2^-max(g_i, 0),  the same for a column
    loss  = 1/2N sum_i [log(1 + r_i / a_i) + log(1 + r'_i / a'_i)] + e s/N [sum_i p_ii - (sum I)(sum T) / N]
    dS_ij = [2^(f (q_ij - m_i)) w_i + 2^(f (q_ij - m'_j)) w'_j - e/N] / N,   w_i = 2^-max(g_i, 0) / 2 (a_i + r_i)
    dS_ii = [e (1 - 1/N) - (r_i / (a_i + r_i) + r'_i / (a'_i + r'_i)) / 2] / N
    dI = s dS T,  dT = s dS^T I,  ds = sum dS p

Pass 1 (`clip_stats`) computes the tiles of p and leaves a (maximum, sum) pair for each row and each column of every
strip of a tile; `fold_stats` combines them in a fixed order, and `clip_weights` makes the loss, the weights w and the
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
dS is stored without its 1/N, which Shares.count is, and times 2^15 (|N dS| <= 1), or float16 would lose the small
probabilities.

SigLIP, with x = z (s I T^T + b), z = 2 eye - 1, needs no normaliser, so one pass gives loss and dS, 6 N^2 D operations:

    loss = 1/N sum_ij log(1 + exp(-x_ij)),   dS = -z / (1 + exp(x)) / N,   db = sum dS

Memory moved beyond the operands: 8 N^2 (1/BLOCK_M + STRIPS/BLOCK_N) bytes of partials, 6 N^2 bytes of dS in half types.
Memory held: O(N D), and a workspace of WORKSPACE bytes, whatever N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import triton
from torch import Tensor

from .. import _triton
from .._aligned_rows import aligned_rows
from .._triton import STRIPS, Tile, launch
from ._feature_gradients import feature_gradients, own_slopes
from ._triton_kernels import clip_grad, clip_stats, clip_weights, fold_stats, siglip
from .pairing import Pairing, Shares
from .smoothing import FeatureSums

# Bytes for the rows of dS, or of the partials, in work at a time. Small when interpreted, so that tests walk chunks.
WORKSPACE = 2**10 if _triton.INTERPRET.value else 2**28
GROUP_M = 8
FOLD = dict(BLOCK_T=16, BLOCK_L=128)
SAME = {None: 0, "positives": 1, "ignored": 2}
NOWHERE = -(2**30)  # an offset that leads to no text

# By architecture: CLIP's and SigLIP's tile for half types, that of either with ids, and the one for float32. None
# spills a register and all fit into shared memory (tests/compile); on sm90 CLIP's leaves room for two blocks, one
# computing products while the other takes exponentials, and SigLIP's, which does not fit twice, is wide instead.
TILES = {
    "interpreter": (Tile(32, 64, 32, 4, 1),) * 4,
    "sm80": (*(Tile(128, 128, 64, 8, 3),) * 3, Tile(128, 128, 16, 8, 3)),
    "sm90": (
        Tile(128, 128, 64, 8, 3, maxnreg=128),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 16, 8, 3),
    ),
    "sm100": (*(Tile(128, 128, 64, 8, 3),) * 3, Tile(128, 128, 16, 8, 3)),
    "cdna": (*(Tile(128, 128, 64, 8, 2),) * 3, Tile(128, 64, 32, 8, 2)),
}
CLIP, SIGLIP, IDS, FLOAT32 = range(4)


def unsupported(image: Tensor, text: Tensor) -> str | None:
    return _triton.unsupported_tensor("image_features", image) or _triton.unsupported_tensor("text_features", text)


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, shares: Shares, label_smoothing: float
) -> Tensor:
    feature_sums = FeatureSums.of(image, text, pairing) if label_smoothing else None
    image, text = aligned_rows(image), aligned_rows(text)
    return _clip_weights(image, text, scale, pairing, shares, label_smoothing, feature_sums)[0]


def clip_loss_with_grads(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, shares: Shares, label_smoothing: float
) -> tuple[Tensor, ...]:
    feature_sums = FeatureSums.of(image, text, pairing) if label_smoothing else None
    loss, *weights = _clip_weights(
        aligned_rows(image), aligned_rows(text), scale, pairing, shares, label_smoothing, feature_sums
    )
    d_image, d_text, sums = _clip_gradients(image, text, scale, pairing, weights, shares.count)
    d_scale = sums[0] / shares.count
    if feature_sums is not None:
        sizes = len(image), len(text)
        less = feature_sums.take_off(scale, shares, label_smoothing, sizes, pairing.counted, d_image, d_text)
        d_scale = d_scale - less
    return loss, d_image, d_text, _like(scale, d_scale)


def clip_statistics(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, rows: Tensor, columns: Tensor
) -> None:
    _clip_statistics(aligned_rows(image), aligned_rows(text), scale, pairing, rows, columns, add=True)


def clip_gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairing: Pairing,
    rows: Tensor,
    columns: Tensor,
    count: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    own = None if pairing.by_ids else own_slopes(pairing, rows, columns)
    d_image, d_text, sums = _clip_gradients(image, text, scale, pairing, (rows, columns, own), count)
    return d_image, d_text, sums[0] / count


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairing: Pairing, count: float) -> Tensor:
    image, text = aligned_rows(image), aligned_rows(text)
    n, m, tile = len(image), len(text), _tile(image, SIGLIP, pairing)
    total = torch.zeros((), dtype=torch.float64, device=image.device)
    for row0, rows in _chunks(pairing, n, m, 4 * triton.cdiv(m, tile.BLOCK_N), tile):
        sums = image.new_empty(_tiles(rows, m, tile), dtype=torch.float32)
        _launch_tiles(siglip, tile, image, text, pairing, row0, rows, scale, bias, None, sums, 0)
        total += sums.sum(dtype=torch.float64)
    return (total / count).float()


def siglip_loss_with_grads(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairing: Pairing, count: float
) -> tuple[Tensor, ...]:
    width = image.shape[1]
    image, text = aligned_rows(image), aligned_rows(text)
    tile = _tile(image, SIGLIP, pairing)

    def write_rows(ds: Tensor, sums: Tensor, row0: int, rows: int) -> None:
        _launch_tiles(siglip, tile, image, text, pairing, row0, rows, scale, bias, ds, sums, ds.stride(0) // 8)

    d_image, d_text, sums = _gradients(write_rows, 3, tile, image, text, scale, pairing, count, width)
    return (sums[0] / count).float(), d_image, d_text, _like(scale, sums[1] / count), _like(bias, sums[2] / count)


def _clip_weights(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairing: Pairing,
    shares: Shares,
    label_smoothing: float,
    feature_sums: FeatureSums | None,
) -> tuple[Tensor | None, ...]:
    """The loss; the weights (4, N) of images and (4, M) of texts, and dS of own pairs."""
    n, m = len(image), len(text)
    statistics = [image.new_empty(3, count, dtype=torch.float32) for count in (n, m)]
    weights = [image.new_empty(4, count, dtype=torch.float32) for count in (n, m)]
    _clip_statistics(image, text, scale, pairing, *statistics, add=False)
    products = None if feature_sums is None else torch.stack(feature_sums.products())
    numbers = shares.row, shares.column, shares.count
    on_device = None
    if isinstance(shares.count, Tensor):
        on_device = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=image.device) for x in numbers])
        numbers = 0.0, 0.0, 0.0
    loss = image.new_empty((), dtype=torch.float32)
    own = None if pairing.by_ids else image.new_empty(n, dtype=torch.float32)
    weights = (*weights, own)
    args = *statistics, pairing.image_counts, pairing.text_counts, *weights, scale, products, on_device, *numbers, loss
    places = n, m, pairing.offset, pairing.first, pairing.last
    block = 512 if pairing.by_ids else 1024
    launch(clip_weights, 1, *args, *places, label_smoothing, SAME=SAME[pairing.same], BLOCK=block)
    return loss, *weights


def _clip_gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairing: Pairing,
    weights: Sequence[Tensor | None],
    count: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both features, and the sum of count dS p."""
    width = image.shape[1]
    image, text = aligned_rows(image), aligned_rows(text)
    tile = _tile(image, CLIP, pairing)

    def write_rows(ds: Tensor, sums: Tensor, row0: int, rows: int) -> None:
        args = *weights, ds, sums, ds.stride(0) // 8
        _launch_tiles(clip_grad, tile, image, text, pairing, row0, rows, scale, *args)

    return _gradients(write_rows, 1, tile, image, text, scale, pairing, count, width)


def _clip_statistics(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, rows: Tensor, columns: Tensor, add: bool
) -> None:
    """Those of images, (3, N), and of texts, (3, M); added to what is there, or the first."""
    n, m, tile = len(image), len(text), _tile(image, CLIP, pairing)
    planes = 3 if pairing.by_ids else 2
    tiles_n = triton.cdiv(m, tile.BLOCK_N)
    for row0, count in _chunks(pairing, n, m, 4 * planes * (STRIPS.value * tiles_n + m // tile.BLOCK_M), tile):
        tiles_m = triton.cdiv(count, tile.BLOCK_M)
        row_parts = image.new_empty(planes, STRIPS.value * tiles_n, count, dtype=torch.float32)
        column_parts = image.new_empty(planes, tiles_m, m, dtype=torch.float32)
        args = row_parts, column_parts, rows[2], columns[2]
        _launch_tiles(clip_stats, tile, image, text, pairing, row0, count, scale, *args)
        _fold(row_parts, rows[:, row0 : row0 + count], scale, pairing, add)
        _fold(column_parts, columns, scale, pairing, add or row0 > 0)


def _fold(parts: Tensor, statistics: Tensor, scale: Tensor, pairing: Pairing, add: bool) -> None:
    _, tiles, length = parts.shape
    programs = triton.cdiv(length, FOLD["BLOCK_L"])
    args = parts, statistics, scale, tiles, length, statistics.stride(0), int(add)
    launch(fold_stats, programs, *args, SAME=SAME[pairing.same], **FOLD)


def _gradients(
    write_rows: Callable[[Tensor, Tensor, int, int], None],
    num_sums: int,
    tile: Tile,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairing: Pairing,
    count: float | Tensor,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both features, `width` columns of them, and the totals of the sums that each tile leaves.

    write_rows(ds, sums, row0, rows) writes the rows of count dS from row0 on, times DS_SCALE, and its tiles' sums.
    """
    m = len(text)
    totals = torch.zeros(num_sums, dtype=torch.float64, device=image.device)

    def write_and_add(ds: Tensor, row0: int) -> None:
        sums = image.new_empty(num_sums, _tiles(len(ds), m, tile), dtype=torch.float32)
        write_rows(ds, sums, row0, len(ds))
        totals.add_(sums.sum(1, dtype=torch.float64))

    chunks = _chunks(pairing, len(image), m, -(-m // 8) * 8 * image.element_size(), tile)
    return *feature_gradients(write_and_add, image, text, scale, count, width, chunks), totals


def _launch_tiles(
    kernel, tile: Tile, image: Tensor, text: Tensor, pairing: Pairing, row0: int, rows: int, *args
) -> None:
    """One program for each tile of the rows [row0, row0 + rows) of S, which are one of the chunks."""
    (n, width), m = image.shape, len(text)
    meta = dict(D=width, PRECISION=_triton.precision(image.dtype), GROUP_M=GROUP_M, SAME=SAME[pairing.same])
    strides = image.stride(0) // 8, text.stride(0) // 8
    has_own = row0 < pairing.last and row0 + rows > pairing.first
    ids = pairing.image_ids, pairing.text_ids, pairing.image_counts, pairing.text_counts
    sizes = *strides, n, m, row0, rows, pairing.offset if has_own else NOWHERE
    launch(kernel, _tiles(rows, m, tile), image, text, *sizes, *ids, *args, **meta, **tile.meta())


def _tile(features: Tensor, loss: int, pairing: Pairing) -> Tile:
    kind = FLOAT32 if features.dtype == torch.float32 else loss if pairing.same is None else IDS
    return TILES[_triton.family(features.device)][kind]


def _tiles(rows: int, columns: int, tile: Tile) -> int:
    return triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(columns, tile.BLOCK_N)


def _chunks(pairing: Pairing, n: int, m: int, bytes_per_row: int, tile: Tile) -> Iterator[tuple[int, int]]:
    """(first row, rows) of what fits into the workspace, of whole tiles as far as possible."""
    return pairing.chunks(n, m, max(WORKSPACE // bytes_per_row // tile.BLOCK_M, 1) * tile.BLOCK_M)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    return value.to(torch.promote_types(parameter.dtype, torch.float32)).reshape(parameter.shape)
