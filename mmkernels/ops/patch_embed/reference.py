"""Patch embedding in plain PyTorch: the definition of right.

x = images, or (images / 255 - mean) / std         rounded to the weight's dtype
Y[b, p, e] = sum_k X[b, p, k] W[e, k] + bias[e] + pos[p, e]        X: the patches of x, a row each
dW = dY^T X,  dX = dY W,  dbias = sum_bp dY
"""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import PatchGeometry
from .patches import Additions, Gradients, Patches


def unsupported(images: Tensor, weight: Tensor) -> str | None:
    return None


def patch_embed(patches: Patches, additions: Additions) -> Tensor:
    weight, geometry = patches.weight, patches.geometry
    bias, positions, prefix = additions
    tokens = _pixels(patches) @ _rows(weight, geometry).T  # (B, N, E)
    if bias is not None:
        tokens = tokens + bias
    if prefix is not None:
        tokens = torch.cat([prefix.expand(geometry.batch, -1, -1), tokens], 1)
    if positions is not None:
        skipped = tokens.shape[1] - positions.shape[0]
        tokens = torch.cat([tokens[:, :skipped], tokens[:, skipped:] + positions], 1)
    return tokens.reshape(geometry.result_shape(weight.shape[0], additions.num_prefix)).contiguous()


def patch_embed_backward(grad: Tensor, patches: Patches, into: Gradients) -> None:
    """grad: (B, N, E)."""
    geometry = into.geometry
    if into.images is not None:
        d_pixels = grad @ _rows(patches.weight, patches.geometry)
        sizes = geometry.view_sizes
        into.images.as_strided(sizes, geometry.view_strides).copy_(d_pixels.reshape(sizes))
    if into.weight is not None:
        d_rows = grad.flatten(0, 1).T @ _pixels(patches).flatten(0, 1)  # (E, K)
        _weight_view(into.weight, geometry).copy_(d_rows.reshape(-1, *geometry.patch))
    if into.bias is not None:
        torch.sum(grad, (0, 1), out=into.bias)


def _pixels(patches: Patches) -> Tensor:
    """(B, N, K), of the weight's dtype."""
    images, weight, mean, std, geometry = patches
    pixels = images.as_strided(geometry.view_sizes, geometry.view_strides, images.storage_offset())
    if mean is not None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        pixels = (pixels.to(wide) / 255 - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    return pixels.to(weight.dtype).reshape(geometry.batch, geometry.patches, geometry.pixels)


def _weight_view(weight: Tensor, geometry: PatchGeometry) -> Tensor:
    strides = (geometry.weight_row_stride, *geometry.weight_strides)
    return weight.as_strided((weight.shape[0], *geometry.patch), strides, weight.storage_offset())  # (E, c, t, y, x)


def _rows(weight: Tensor, geometry: PatchGeometry) -> Tensor:
    return _weight_view(weight, geometry).reshape(weight.shape[0], geometry.pixels)
