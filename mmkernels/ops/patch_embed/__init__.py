"""Patch embedding: a convolution whose stride is its kernel, computed as the matrix product it is."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .. import _checks
from . import op
from .geometry import known_patch_geometry, patch_geometry

__all__ = ["patch_embed"]


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    layout: str = "chw",
    backend: str | None = None,
) -> Tensor:
    """Embed non-overlapping patches (ViT, Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929) in one pass.

    Patches are read where they lie, whatever the strides, multiplied with the weight, and bias, positions and prefix
    tokens are added before the one rounding to the result's dtype.

    Args:
        images: one of
            (B, C, H, W) images; what is left at the right and lower edge is dropped, as a strided convolution does;
            (B, C, T, H, W) videos, for a weight that spans frames;
            (N, K) or (B, N, K) rows already cut, K = C * [T *] P * P, in the order that `layout` names.
            Any floating dtype, converted to the weight's on the way, or uint8 with `mean` and `std`.
        weight: as the checkpoint stores it: (E, C, P, P) of a Conv2d, (E, C, T, P, P) of a Conv3d, (E, K) of a Linear.
            float32, bfloat16 or float16 (float64 by the reference); its dtype is the result's.
        bias: (E,).
        pos_embed: (N, E), added to the N patches of each image, or (prefix + N, E), added to the prefix tokens too.
        prefix: (n, E), tokens put before the patches of each image (a class token).
        mean, std: (C,), float32: embed (images / 255 - mean) / std, without writing that image. uint8 images need
            both; other images take neither.
        layout: the order inside rows already cut: "chw" (C, [T,] P, P), "hwc" ([T,] P, P, C), "tchw" (T, C, P, P). With
            an (E, K) weight, the order of its rows too.
        backend: "cuda", "triton", "cpu", "reference"; None takes the fastest that supports the call.

    Returns:
        (B, n + N, E), or (N, E) for (N, K) rows, in the weight's dtype. Differentiable, any number of times, in weight,
        bias, pos_embed, prefix and floating images.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device; the message names it.
        BackendUnavailable: the backend asked for cannot serve the call.
    """
    _check_images(images, mean, std)
    _checks.floating("patch_embed", "weight", weight)
    weight, bias, pos_embed, prefix = _checks.autocast(weight, bias, pos_embed, prefix)
    _checks.same_device("patch_embed", "weight", weight, "images", images)
    find = patch_geometry if torch.compiler.is_compiling() else known_patch_geometry
    geometry = find(images, weight, None if mean is None else mean.numel(), layout)
    _check_normalisation(mean, std, geometry.patch[0], images)
    _check_additions(bias, pos_embed, prefix, weight, geometry)
    return op.patch_embed(images, weight, bias, pos_embed, prefix, mean, std, layout, backends.requested(backend))


def _check_images(images: Tensor, mean: Tensor | None, std: Tensor | None) -> None:
    _checks.tensor("patch_embed", "images", images)
    if images.dtype != torch.uint8:
        _checks.floating("patch_embed", "images", images)
        if mean is not None or std is not None:
            raise ValueError(
                f"patch_embed: mean and std normalise uint8 images, images has dtype {images.dtype}; "
                "leave them out, or give the uint8 images"
            )
    elif mean is None or std is None:
        raise ValueError("patch_embed: uint8 images need mean and std, tensors of one value a channel")
    else:
        _checks.tensor("patch_embed", "mean", mean)
        _checks.tensor("patch_embed", "std", std)


def _check_normalisation(mean: Tensor | None, std: Tensor | None, channels: int, images: Tensor) -> None:
    for label, value in (("mean", mean), ("std", std)):
        if value is None:
            continue
        if value.dtype != torch.float32 or value.shape != (channels,):
            raise ValueError(
                f"patch_embed: {label} has shape {tuple(value.shape)} and dtype {value.dtype}; it must be "
                f"({channels},) of float32, one value a channel"
            )
        _checks.same_device("patch_embed", label, value, "images", images)


def _check_additions(bias, pos_embed, prefix, weight: Tensor, geometry) -> None:
    features = weight.shape[0]
    tokens = geometry.patches
    if prefix is not None:
        _check_addition("prefix", prefix, weight)
        if prefix.dim() != 2 or prefix.shape[1] != features:
            raise ValueError(f"patch_embed: prefix has shape {tuple(prefix.shape)}; it must be (n, {features})")
        if not geometry.batched:
            raise ValueError("patch_embed: prefix needs images with a batch axis; give the rows as (B, N, K)")
        tokens += prefix.shape[0]
    if bias is not None:
        _check_addition("bias", bias, weight)
        if bias.shape != (features,):
            raise ValueError(f"patch_embed: bias has shape {tuple(bias.shape)}; it must be ({features},)")
    if pos_embed is not None:
        _check_addition("pos_embed", pos_embed, weight)
        if pos_embed.shape not in ((geometry.patches, features), (tokens, features)):
            with_prefix = f" or ({tokens}, {features})" if prefix is not None else ""
            raise ValueError(
                f"patch_embed: pos_embed has shape {tuple(pos_embed.shape)}; it must be "
                f"({geometry.patches}, {features}){with_prefix}"
            )


def _check_addition(label: str, value: Tensor, weight: Tensor) -> None:
    _checks.tensor("patch_embed", label, value)
    _checks.same_dtype("patch_embed", label, value, "weight", weight)
    _checks.same_device("patch_embed", label, value, "weight", weight)
