"""Patch embedding in plain PyTorch: the definition of right.

x = images, or (images / 255 - mean) / std         rounded to the weight's dtype
Y[b, p, e] = sum_k X[b, p, k] W[e, k] + bias[e] + pos[p, e]        X: the patches of x, a row each
dW = dY^T X,  dX = dY W,  dbias = sum_bp dY
"""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import PatchGeometry


def unsupported(images: Tensor, weight: Tensor) -> str | None:
    return None


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    geometry: PatchGeometry,
) -> Tensor:
    tokens = _patches(images, weight, mean, std, geometry) @ _rows(weight, geometry).T  # (B, N, E)
    if bias is not None:
        tokens = tokens + bias
    num_prefix = 0 if prefix is None else prefix.shape[0]
    if prefix is not None:
        tokens = torch.cat([prefix.expand(geometry.batch, -1, -1), tokens], 1)
    if pos_embed is not None:
        skipped = tokens.shape[1] - pos_embed.shape[0]
        tokens = torch.cat([tokens[:, :skipped], tokens[:, skipped:] + pos_embed], 1)
    return tokens.reshape(geometry.result_shape(weight.shape[0], num_prefix)).contiguous()


def patch_embed_backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    geometry: PatchGeometry,
    d_images: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    into: PatchGeometry,
) -> None:
    """grad: (B, N, E). Fills those of d_images (given as zeros), d_weight, d_bias that are not None; `into` is their
    geometry."""
    if d_images is not None:
        d_patches = grad @ _rows(weight, geometry)
        d_images.as_strided(into.view_sizes, into.view_strides).copy_(d_patches.reshape(into.view_sizes))
    if d_weight is not None:
        patches = _patches(images, weight, mean, std, geometry)
        d_rows = grad.flatten(0, 1).T @ patches.flatten(0, 1)  # (E, K)
        _weight_view(d_weight, into).copy_(d_rows.reshape(-1, *into.patch))
    if d_bias is not None:
        torch.sum(grad, (0, 1), out=d_bias)


def _patches(
    images: Tensor, weight: Tensor, mean: Tensor | None, std: Tensor | None, geometry: PatchGeometry
) -> Tensor:
    patches = images.as_strided(geometry.view_sizes, geometry.view_strides, images.storage_offset())
    if mean is not None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        patches = (patches.to(wide) / 255 - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    return patches.to(weight.dtype).reshape(geometry.batch, geometry.patches, geometry.pixels)


def _weight_view(weight: Tensor, geometry: PatchGeometry) -> Tensor:
    strides = (geometry.weight_row_stride, *geometry.weight_strides)
    return weight.as_strided((weight.shape[0], *geometry.patch), strides, weight.storage_offset())  # (E, c, t, y, x)


def _rows(weight: Tensor, geometry: PatchGeometry) -> Tensor:
    return _weight_view(weight, geometry).reshape(weight.shape[0], geometry.pixels)
