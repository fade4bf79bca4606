"""The order in which GPU kernels walk the pixels of a patch: that of memory.

The order of a product's inner index is free as long as both sides have the same one. Pixels are walked by address, so
that neighbours are loaded together, and the weight, which is small, is copied into that order where it has another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .._aligned_rows import aligned_rows
from .geometry import PatchGeometry


@dataclass(frozen=True)
class Pixels:
    """The pixels of a patch by address, as up to four nested loops of merged dimensions."""

    order: tuple[int, ...]  # of (c, t, y, x), outermost first
    sizes: tuple[int, ...]  # four, ones in front
    strides: tuple[int, ...]
    unit: bool  # the innermost stride is 1
    vector: int  # the power of two that divides the length of a run, every stride above it and the first address
    channel_inner: int  # pixels in a row that share a channel

    @classmethod
    def of(cls, tensor: Tensor, geometry: PatchGeometry) -> Pixels:
        patch, strides = geometry.patch, geometry.patch_strides
        # A dimension that is repeated (stride 0) goes outside, where it does not break the runs of neighbours.
        order = sorted(range(4), key=lambda d: (patch[d] == 1, strides[d] == 0, strides[d]), reverse=True)
        merged: list[tuple[int, int]] = []  # innermost first
        for d in reversed(order):
            if merged and strides[d] == math.prod(merged[-1]):
                merged[-1] = (merged[-1][0] * patch[d], merged[-1][1])
            elif patch[d] > 1:
                merged.append((patch[d], strides[d]))
        merged += [(1, 0)] * (4 - len(merged))
        sizes, outer = zip(*reversed(merged), strict=True)
        unit = outer[3] == 1
        aligned = tensor.data_ptr() % 16 == 0 and unit
        rows = (geometry.batch_stride, *geometry.grid_strides, *outer[:3])
        vector = math.gcd(sizes[3], *rows, 16 // tensor.element_size()) if aligned else 1
        inner = math.prod(patch[d] for d in order[order.index(0) + 1 :])
        return cls(tuple(order), sizes, outer, unit, vector, inner)


def weight_view(weight: Tensor, geometry: PatchGeometry, order: tuple[int, ...]) -> Tensor:
    sizes = (weight.shape[0], *(geometry.patch[d] for d in order))
    strides = (geometry.weight_row_stride, *(geometry.weight_strides[d] for d in order))
    return weight.as_strided(sizes, strides, weight.storage_offset())


def weight_rows(weight: Tensor, geometry: PatchGeometry, pixels: Pixels) -> Tensor:
    """(E, K) in the order of the pixels, ready for the kernels."""
    return aligned_rows(weight_view(weight, geometry, pixels.order).reshape(weight.shape[0], geometry.pixels))
