"""Patch embedding in Triton: a matrix product that reads its left operand where the pixels lie.

    x = images, or (images / 255 - mean) / std         rounded to the weight's dtype
    Y[b, p, e] = sum_k X[b, p, k] W[e, k] + bias[e] + pos[p, e]        float32 sums, rounded once
    dW = dY^T X,  dX = dY W,  dbias = sum_bp dY

The address of pixel k of patch m is a sum of two parts, one from m and one from k, each a few strides; so images,
videos, rows in any order and channels_last are one kernel, and no patch is copied. The order of k is free as long as W
has the same one: pixels are walked in the order they have in memory, runs of neighbours merged, and the weight, which
is small, is copied into that order where it has another.

Bytes come in as uint8 and are normalised in registers, x * (1 / 255 std) - mean / std in float32, then rounded to the
weight's dtype: the very numbers that PyTorch would multiply. Folding mean and std into the weight would save these two
operations a pixel, but it rounds the folded weight instead of the pixel, and the gradient of the weight needs the
normalised pixels all the same.

dW sums over all patches, more than the few tiles of dW have programs for: the patches are split into a number of runs
that depends on the sizes only, each sums into a float32 copy of its own, and the copies are added in order. Every pixel
belongs to one patch, so dX is stored, never accumulated.

Memory moved, with X read once for each BLOCK_N columns of E (from L2 but for the first): X + W + Y; dW: X + dY + 8
bytes for each element of each copy; dX: dY + W + X.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .._aligned_rows import aligned_rows
from .._triton import STRIPS, Tile, dot, launch, rounded, strips_of
from .geometry import PatchGeometry
from .patches import Additions, Gradients, Patches
from .pixels import Pixels, weight_rows, weight_view

IMAGE_DTYPES = (*_triton.DTYPES, torch.uint8)
PROGRAMS = 256  # that a split of the weight gradient aims at: two for each multiprocessor of the largest GPUs

# By architecture: half types, float32. None spills a register and all fit into shared memory (tests/compile); on sm90
# there is room for two blocks a multiprocessor.
TILES = {
    "interpreter": (Tile(16, 32, 64, 4, 1), Tile(16, 32, 64, 4, 1)),
    "sm80": (Tile(128, 128, 64, 8, 3), Tile(128, 128, 16, 8, 3)),
    "sm90": (Tile(128, 128, 64, 8, 3, maxnreg=128), Tile(128, 128, 16, 8, 3)),
    "sm100": (Tile(128, 128, 64, 8, 3), Tile(128, 128, 16, 8, 3)),
    "cdna": (Tile(128, 128, 64, 8, 2), Tile(128, 64, 32, 8, 2)),
}


def unsupported(images: Tensor, weight: Tensor) -> str | None:
    return _triton.unsupported_tensor("images", images, IMAGE_DTYPES) or _triton.unsupported_tensor("weight", weight)


def patch_embed(patches: Patches, additions: Additions) -> Tensor:
    images, weight, mean, _, geometry = patches
    bias, positions, prefix = additions
    features, num_prefix = weight.shape[0], additions.num_prefix
    tokens = weight.new_empty(geometry.batch, num_prefix + geometry.patches, features)
    pixels, tile = Pixels.of(images, geometry), _tile(weight, two_blocks=mean is None)
    rows = weight_rows(weight, geometry, pixels)
    count = geometry.batch * geometry.patches
    skipped = 0 if positions is None else positions.shape[0] - geometry.patches
    launch(
        embed, triton.cdiv(count, tile.BLOCK_M) * triton.cdiv(features, tile.BLOCK_N),
        images, rows, bias, positions, *_normalisation(patches), tokens,
        *_walk(pixels, geometry), rows.stride(0) // 8, count, num_prefix, skipped, geometry.pixels,
        E=features, K=geometry.pixels, WIDTH=rows.shape[1], **_channels(geometry, pixels),
        **_meta(weight, pixels, tile),
    )  # fmt: skip
    if num_prefix:
        first = tokens[:, :num_prefix]
        if skipped:
            torch.add(prefix.expand_as(first), positions[:num_prefix], out=first)
        else:
            first.copy_(prefix.expand_as(first))
    return tokens.view(geometry.result_shape(features, num_prefix))


def patch_embed_backward(grad: Tensor, patches: Patches, into: Gradients) -> None:
    """grad: (B, N, E)."""
    if into.bias is not None:
        torch.sum(grad, (0, 1), out=into.bias)
    if into.images is None and into.weight is None:
        return
    grad = aligned_rows(grad)
    if into.images is not None:
        _write_images_grad(grad, patches, into)
    if into.weight is not None:
        _write_weight_grad(grad, patches, into)


def _write_images_grad(grad: Tensor, patches: Patches, into: Gradients) -> None:
    weight, d_images, geometry = patches.weight, into.images, into.geometry
    pixels, tile = Pixels.of(d_images, geometry), _tile(weight, two_blocks=True)
    rows = weight_rows(weight, patches.geometry, pixels)
    count = geometry.batch * geometry.patches
    launch(
        images_grad, triton.cdiv(count, tile.BLOCK_M) * triton.cdiv(geometry.pixels, tile.BLOCK_N),
        grad, rows, d_images, *_walk(pixels, geometry),
        grad.stride(0) // 8, grad.stride(1) // 8, rows.stride(0) // 8, count, weight.shape[0],
        E=weight.shape[0], K=geometry.pixels, WIDTH=rows.shape[1], E_WIDTH=grad.shape[-1],
        **_meta(weight, pixels, tile),
    )  # fmt: skip


def _write_weight_grad(grad: Tensor, patches: Patches, into: Gradients) -> None:
    images, weight, *_, geometry = patches
    pixels, tile = Pixels.of(images, geometry), _tile(weight, two_blocks=False)
    features, count = weight.shape[0], geometry.batch * geometry.patches
    tiles = triton.cdiv(features, tile.BLOCK_M) * triton.cdiv(geometry.pixels, tile.BLOCK_N)
    splits = max(1, min(PROGRAMS // tiles, triton.cdiv(count, 2 * tile.BLOCK_K)))
    run = triton.cdiv(triton.cdiv(count, splits), tile.BLOCK_K) * tile.BLOCK_K
    splits = triton.cdiv(count, run)
    copies = weight.new_empty(splits, features, geometry.pixels, dtype=torch.float32)
    launch(
        weight_grad, splits * tiles,
        grad, images, *_normalisation(patches), copies, *_walk(pixels, geometry), *_divisors(geometry),
        grad.stride(0) // 8, grad.stride(1) // 8, count, run,
        E=features, K=geometry.pixels, E_WIDTH=grad.shape[-1], **_channels(geometry, pixels),
        **_meta(weight, pixels, tile),
    )  # fmt: skip
    d_rows = copies[0] if splits == 1 else copies.sum(0)
    target = weight_view(into.weight, into.geometry, pixels.order)
    target.copy_(d_rows.view(target.shape))


def _walk(pixels: Pixels, geometry: PatchGeometry) -> tuple[int, ...]:
    """Strides of (b, gt, gy, gx) and of the four loops in units of the vector, and the sizes of the grid."""
    strides = (geometry.batch_stride, *geometry.grid_strides, *pixels.strides)
    innermost = 0 if pixels.unit else strides[-1]
    return *(s // pixels.vector for s in strides[:-1]), innermost, geometry.patches, *geometry.grid[1:]


def _divisors(geometry: PatchGeometry) -> tuple[int, ...]:
    """`_divided` by the patches of an image, by those of a frame and by those of a row: multiplier and shift of each.

    With 2^(shift - 1) < d <= 2^shift, n / d is n (2^(31 + shift) / d) / 2^(31 + shift), and so it is of the multiplier
    rounded up, for every n < 2^31: what is added stays below n / (2^31 d), less than is missing to the next integer.
    """
    _, rows, columns = geometry.grid
    shifts = [(d, (d - 1).bit_length()) for d in (geometry.patches, rows * columns, columns)]
    return tuple(part for d, shift in shifts for part in ((1 << 31 + shift) // d + 1, shift))


def _normalisation(patches: Patches) -> tuple[Tensor | None, Tensor | None]:
    """Factor and offset of each channel: x * factor - offset."""
    mean, std = patches.mean, patches.std
    return (None, None) if mean is None else ((std * 255).reciprocal_(), mean / std)


def _channels(geometry: PatchGeometry, pixels: Pixels) -> dict[str, int]:
    return dict(CHANNELS=geometry.patch[0], CHANNEL_INNER=pixels.channel_inner)


def _meta(weight: Tensor, pixels: Pixels, tile: Tile) -> dict[str, object]:
    walk = dict(SIZES=pixels.sizes, UNIT=pixels.unit, VECTOR=pixels.vector)
    return dict(PRECISION=_triton.precision(weight.dtype), **walk, **tile.meta())


def _tile(weight: Tensor, two_blocks: bool) -> Tile:
    """Normalising, and addresses of both operands that change in the loop, need the registers of a second block."""
    tile = TILES[_triton.family(weight.device)][weight.dtype == torch.float32]
    return tile if two_blocks else replace(tile, maxnreg=None)


@triton.jit
def _patch_offsets(m, stride_b, stride_t, stride_y, stride_x, patches, grid_y, grid_x, VECTOR: tl.constexpr):
    """Where patch m starts, in elements."""
    b, p = m // patches, m % patches
    t, y, x = p // (grid_y * grid_x), p // grid_x % grid_y, p % grid_x
    return _patch_offset(b, t, y, x, stride_b, stride_t, stride_y, stride_x, VECTOR)


@triton.jit
def _patch_offset(b, t, y, x, stride_b, stride_t, stride_y, stride_x, VECTOR: tl.constexpr):
    at = b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return at * VECTOR


@triton.jit
def _divided(n, multiplier, shift):
    """n / d and the rest of it would take twenty instructions: of n < 2^31, and what `_divisors` says of d."""
    return (tl.umulhi((n * 2).to(tl.uint32, bitcast=True), multiplier.to(tl.uint32)) >> shift).to(tl.int32)


@triton.jit
def _pixel_offsets(
    k, stride_0, stride_1, stride_2, stride_3, SIZES: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr
):
    """Where pixel k lies in its patch. The constant sizes show the compiler which pixels are neighbours."""
    i_3, k = k % SIZES[3], k // SIZES[3]
    i_2, k = k % SIZES[2], k // SIZES[2]
    i_1, i_0 = k % SIZES[1], k // SIZES[1]
    outer = i_0.to(tl.int64) * stride_0 + i_1.to(tl.int64) * stride_1 + i_2.to(tl.int64) * stride_2
    if UNIT:
        return outer * VECTOR + i_3
    return outer * VECTOR + i_3.to(tl.int64) * stride_3


@triton.jit
def _normalised(x, k, factor, offset, dtype: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_INNER: tl.constexpr):
    """Pixels [rows, k] in the weight's dtype."""
    if factor is not None:
        c = k // CHANNEL_INNER % CHANNELS
        x = x.to(tl.float32) * tl.load(factor + c)[None, :] - tl.load(offset + c)[None, :]
    if x.dtype == dtype:
        return x
    return rounded(x.to(tl.float32), dtype)


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_t", "stride_y", "stride_x", "stride_0", "stride_1", "stride_2", "stride_3",
        "patches", "grid_y", "grid_x", "stride_w8", "count", "num_prefix", "skipped", "depth",
    ]
)  # fmt: skip
def embed(
    images,
    weight,  # [E, WIDTH], zeros from K on
    bias, positions,  # [E], [skipped + patches, E], or None
    factor, offset,  # [CHANNELS], or None
    tokens,  # [B, num_prefix + patches, E]
    stride_b, stride_t, stride_y, stride_x, stride_0, stride_1, stride_2, stride_3, patches, grid_y, grid_x,
    stride_w8, count, num_prefix, skipped,
    depth,  # K, of which the compiler knows nothing: it would unroll the loop
    E: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_INNER: tl.constexpr,
    PRECISION: tl.constexpr, SIZES: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n  # a row's tiles together: X stays in L2
    m, e = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the last one again and are not stored.
    at = _patch_offsets(
        tl.minimum(m, count - 1), stride_b, stride_t, stride_y, stride_x, patches, grid_y, grid_x, VECTOR
    )
    p_weight = weight + tl.minimum(e, E - 1)[:, None].to(tl.int64) * stride_w8 * 8
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        p_images = images + at[:, None] + _pixel_offsets(
            k, stride_0, stride_1, stride_2, stride_3, SIZES, UNIT, VECTOR
        )[None, :]  # fmt: skip
        if K % BLOCK_K == 0:
            x, w = tl.load(p_images), tl.load(p_weight + k[None, :])
        else:
            x = tl.load(p_images, mask=k[None, :] < K, other=0)
            w = tl.load(p_weight + k[None, :], mask=k[None, :] < WIDTH, other=0.0)
        x = _normalised(x, k, factor, offset, weight.dtype.element_ty, CHANNELS, CHANNEL_INNER)
        sums = dot(x, w.T, sums, PRECISION)

    inside = (m[:, None] < count) & (e[None, :] < E)
    b, p = m // patches, m % patches
    if bias is not None:
        sums += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    if positions is not None:
        p_positions = positions + (skipped + p)[:, None].to(tl.int64) * E + e[None, :]
        sums += tl.load(p_positions, mask=inside, other=0.0).to(tl.float32)
    row = b.to(tl.int64) * (num_prefix + patches) + num_prefix + p
    tl.store(tokens + row[:, None] * E + e[None, :], rounded(sums, tokens.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_t", "stride_y", "stride_x", "stride_0", "stride_1", "stride_2", "stride_3",
        "patches", "grid_y", "grid_x", "stride_gb8", "stride_gp8", "stride_w8", "count", "depth",
    ]
)  # fmt: skip
def images_grad(
    grad,  # [B, patches, E_WIDTH]
    weight,  # [E, WIDTH]
    d_images,
    stride_b, stride_t, stride_y, stride_x, stride_0, stride_1, stride_2, stride_3, patches, grid_y, grid_x,
    stride_gb8, stride_gp8, stride_w8, count,
    depth,  # E, as in `embed`
    E: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, E_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, SIZES: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    m, k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_read = tl.minimum(m, count - 1)
    g_row = (m_read // patches).to(tl.int64) * stride_gb8 + (m_read % patches).to(tl.int64) * stride_gp8
    p_grad = grad + (g_row * 8)[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for e0 in tl.range(0, depth, BLOCK_K):
        e = e0 + tl.arange(0, BLOCK_K)
        g = tl.load(p_grad + e[None, :], mask=e[None, :] < E_WIDTH, other=0.0)
        p_weight = weight + e[:, None].to(tl.int64) * stride_w8 * 8 + k[None, :]
        w = tl.load(p_weight, mask=(e[:, None] < E) & (k[None, :] < WIDTH), other=0.0)
        sums = dot(g, w, sums, PRECISION)
    at = _patch_offsets(m_read, stride_b, stride_t, stride_y, stride_x, patches, grid_y, grid_x, VECTOR)
    strips = strips_of(sums, BLOCK_M, BLOCK_N)
    for strip in tl.static_range(STRIPS):
        k = tile_n * BLOCK_N + strip * (BLOCK_N // STRIPS) + tl.arange(0, BLOCK_N // STRIPS)
        pixel = _pixel_offsets(k, stride_0, stride_1, stride_2, stride_3, SIZES, UNIT, VECTOR)
        inside = (m[:, None] < count) & (k[None, :] < K)
        p_images = d_images + at[:, None] + pixel[None, :]
        tl.store(p_images, rounded(strips[strip], d_images.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_t", "stride_y", "stride_x", "stride_0", "stride_1", "stride_2", "stride_3",
        "patches", "grid_y", "grid_x", "by_patches", "of_patches", "by_frame", "of_frame", "by_row", "of_row",
        "stride_gb8", "stride_gp8", "count", "run",
    ]
)  # fmt: skip
def weight_grad(
    grad,  # [B, patches, E_WIDTH]
    images, factor, offset,
    copies,  # [splits, E, K]
    stride_b, stride_t, stride_y, stride_x, stride_0, stride_1, stride_2, stride_3, patches, grid_y, grid_x,
    by_patches, of_patches, by_frame, of_frame, by_row, of_row,  # see _divisors
    stride_gb8, stride_gp8, count, run,
    E: tl.constexpr, K: tl.constexpr, E_WIDTH: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_INNER: tl.constexpr,
    PRECISION: tl.constexpr, SIZES: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = (E + BLOCK_M - 1) // BLOCK_M * tiles_n
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles  # a split's tiles together: X and dY stay in L2
    e, k = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M), tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = _pixel_offsets(k, stride_0, stride_1, stride_2, stride_3, SIZES, UNIT, VECTOR)
    end = tl.minimum((split + 1) * run, count)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m0 in tl.range(split * run, end, BLOCK_K):
        m = m0 + tl.arange(0, BLOCK_K)
        b = _divided(m, by_patches, of_patches)
        p = m - b * patches
        t = _divided(p, by_frame, of_frame)
        in_frame = p - t * (grid_y * grid_x)
        y = _divided(in_frame, by_row, of_row)
        g_row = b.to(tl.int64) * stride_gb8 + p.to(tl.int64) * stride_gp8
        g = tl.load(
            grad + (g_row * 8)[None, :] + e[:, None], mask=(m[None, :] < end) & (e[:, None] < E_WIDTH), other=0.0
        )
        at = _patch_offset(b, t, y, in_frame - y * grid_x, stride_b, stride_t, stride_y, stride_x, VECTOR)
        x = tl.load(images + at[:, None] + pixel[None, :], mask=(m[:, None] < end) & (k[None, :] < K), other=0)
        x = _normalised(x, k, factor, offset, grad.dtype.element_ty, CHANNELS, CHANNEL_INNER)
        sums = dot(g, x, sums, PRECISION)
    p_copies = copies + split.to(tl.int64) * (E * K) + e[:, None].to(tl.int64) * K + k[None, :]
    tl.store(p_copies, sums, mask=(e[:, None] < E) & (k[None, :] < K))
