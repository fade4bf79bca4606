"""Where each pixel of each patch lies: the one description that every backend of patch_embed works from.

Whatever form the images come in, a patch is an index (b, gt, gy, gx) into a grid and a pixel is an index (c, t, y, x)
into the patch, both with a stride in elements; a weight row has the same four inner indices. So an image batch, a
video, rows already cut in any order and a channels_last tensor differ in numbers only, and no backend copies or
permutes anything first.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

LAYOUTS = ("chw", "hwc", "tchw")


@dataclass(frozen=True)
class PatchGeometry:
    """Sizes and strides (in elements) of the patches of an images tensor, and of the weight's rows."""

    batch: int
    grid: tuple[int, int, int]  # patches along time, height, width
    patch: tuple[int, int, int, int]  # channels, frames, height, width
    batch_stride: int
    grid_strides: tuple[int, int, int]
    patch_strides: tuple[int, int, int, int]
    weight_strides: tuple[int, int, int, int]  # of (c, t, y, x) inside one output feature's row
    weight_row_stride: int
    batched: bool  # False for (N, K) rows, whose result has no batch axis

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    @property
    def pixels(self) -> int:
        return math.prod(self.patch)

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """The images as a strided tensor (b, gt, gy, gx, c, t, y, x); with `view_strides` an as_strided view."""
        return (self.batch, *self.grid, *self.patch)

    @property
    def view_strides(self) -> tuple[int, ...]:
        return (self.batch_stride, *self.grid_strides, *self.patch_strides)

    def result_shape(self, features: int, prefix: int) -> tuple[int, ...]:
        tokens = prefix + self.patches
        return (self.batch, tokens, features) if self.batched else (tokens, features)


class _Strided(NamedTuple):
    """All that matters here of a tensor; hashable unless its sizes are symbolic."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


def patch_geometry(images, weight, channels: int | None, layout: str) -> PatchGeometry:
    """The geometry of a call on two tensors. `channels` is the length of mean, where given: it tells the channels of
    plain rows.

    Raises ValueError with the argument's name where shapes do not fit. Serves tensors with symbolic sizes too, when
    torch traces; `known_patch_geometry` remembers its answers and is what a call that runs should use.
    """
    return _geometry(*_describe(images, weight), channels, layout)


def known_patch_geometry(images, weight, channels: int | None, layout: str) -> PatchGeometry:
    """`patch_geometry`, remembered: a model asks for the same few again and again, and it takes as long as an op."""
    return _known(*_describe(images, weight), channels, layout)


def _describe(images, weight) -> tuple[_Strided, _Strided]:
    return _Strided(images.shape, images.stride()), _Strided(weight.shape, weight.stride())


def _geometry(images: _Strided, weight: _Strided, channels: int | None, layout: str) -> PatchGeometry:
    if layout not in LAYOUTS:
        raise ValueError(f"patch_embed: layout is {layout!r}; accepted are {', '.join(map(repr, LAYOUTS))}")
    if len(weight.shape) not in (2, 4, 5):
        raise ValueError(
            f"patch_embed: weight has shape {tuple(weight.shape)}; accepted are (E, C, P, P) of a Conv2d, "
            "(E, C, T, P, P) of a Conv3d and (E, K) of a Linear"
        )
    if len(images.shape) in (2, 3):
        return _rows(images, weight, channels, layout)
    if len(images.shape) in (4, 5):
        return _pictures(images, weight, layout)
    raise ValueError(
        f"patch_embed: images has shape {tuple(images.shape)}; accepted are (B, C, H, W), (B, C, T, H, W) and rows "
        "already cut, (N, K) or (B, N, K)"
    )


_known = functools.lru_cache(maxsize=1024)(_geometry)


def _pictures(images: _Strided, weight: _Strided, layout: str) -> PatchGeometry:
    patch, weight_strides = _picture_weight(images, weight, layout)
    channels, frames, height, width = patch
    if images.shape[1] != channels:
        raise ValueError(f"patch_embed: images has {images.shape[1]} channels, weight {channels}")
    if len(images.shape) == 4:
        if frames != 1:
            raise ValueError(f"patch_embed: weight spans {frames} frames; images must then be (B, C, T, H, W)")
        (batch, _, rows, columns), (sb, sc, sy, sx) = images.shape, images.strides
        depth, st = 1, 0
    else:
        (batch, _, depth, rows, columns), (sb, sc, st, sy, sx) = images.shape, images.strides
    if depth < frames or rows < height or columns < width:
        raise ValueError(
            f"patch_embed: images of {depth} x {rows} x {columns} (frames, height, width) are smaller than one patch "
            f"of {frames} x {height} x {width}"
        )
    return PatchGeometry(
        batch=batch,
        grid=(depth // frames, rows // height, columns // width),
        patch=patch,
        batch_stride=sb,
        grid_strides=(frames * st, height * sy, width * sx),
        patch_strides=(sc, st, sy, sx),
        weight_strides=weight_strides,
        weight_row_stride=weight.strides[0],
        batched=True,
    )


def _picture_weight(images: _Strided, weight: _Strided, layout: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Patch sizes (c, t, y, x) and the weight's strides along them, for images not yet cut."""
    if len(weight.shape) == 2:
        channels, pixels = images.shape[1], weight.shape[1]
        side = math.isqrt(pixels // channels)
        if len(images.shape) == 5 or layout == "tchw" or side * side * channels != pixels or side == 0:
            raise ValueError(
                f"patch_embed: a weight of shape {tuple(weight.shape)} does not tell the patch size of images of shape "
                f"{tuple(images.shape)}; give it as (E, C, P, P) or (E, C, T, P, P)"
            )
        return (channels, 1, side, side), _inner_strides((channels, 1, side, side), layout, weight.strides[1])
    if layout != "chw":
        raise ValueError(
            f"patch_embed: layout is {layout!r}, which names the order of rows already cut (or of a 2-D weight); "
            f"images of shape {tuple(images.shape)} with a weight of shape {tuple(weight.shape)} take 'chw'"
        )
    return _convolution(weight)


def _rows(images: _Strided, weight: _Strided, channels: int | None, layout: str) -> PatchGeometry:
    pixels = images.shape[-1]
    if math.prod(weight.shape[1:]) != pixels:
        raise ValueError(
            f"patch_embed: images has rows of {pixels} elements, weight of shape {tuple(weight.shape)} takes rows of "
            f"{math.prod(weight.shape[1:])}"
        )
    if len(weight.shape) == 2:
        patch = _plain_patch(pixels, channels, layout)
        weight_strides = _inner_strides(patch, layout, weight.strides[1])
    else:
        patch, weight_strides = _convolution(weight)
    batched = len(images.shape) == 3
    return PatchGeometry(
        batch=images.shape[0] if batched else 1,
        grid=(1, 1, images.shape[-2]),
        patch=patch,
        batch_stride=images.strides[0] if batched else 0,
        grid_strides=(0, 0, images.strides[-2]),
        patch_strides=_inner_strides(patch, layout, images.strides[-1]),
        weight_strides=weight_strides,
        weight_row_stride=weight.strides[0],
        batched=batched,
    )


def _plain_patch(pixels: int, channels: int | None, layout: str) -> tuple[int, int, int, int]:
    """Rows against an (E, K) weight: both are in the same order, so only the channels of a normalisation matter."""
    if channels is None:
        return (1, 1, 1, pixels)
    if layout == "tchw" or pixels % channels:
        raise ValueError(
            f"patch_embed: mean has {channels} channels, which an (E, {pixels}) weight with layout {layout!r} does not "
            "place; give weight as (E, C, P, P) or (E, C, T, P, P)"
        )
    return (channels, 1, 1, pixels // channels)


def _convolution(weight: _Strided) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    sizes, strides = tuple(weight.shape[1:]), tuple(weight.strides[1:])
    if len(weight.shape) == 4:
        sizes, strides = (sizes[0], 1, *sizes[1:]), (strides[0], 0, *strides[1:])
    return sizes, strides


def _inner_strides(patch: tuple[int, int, int, int], layout: str, unit: int) -> tuple[int, int, int, int]:
    """Strides of (c, t, y, x) in a row whose elements lie `unit` apart in the order that `layout` names."""
    c, t, y, x = patch
    orders = {
        "chw": (t * y * x, y * x, x, 1),
        "hwc": (1, y * x * c, x * c, c),
        "tchw": (y * x, c * y * x, x, 1),
    }
    return tuple(stride * unit for stride in orders[layout])
