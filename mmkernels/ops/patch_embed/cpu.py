"""Patch embedding by the compiled core: addresses, sizes and strides out, nothing copied."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _core
from .._core_tensors import FLOATS, unserved
from .geometry import PatchGeometry

_PIXELS = {**FLOATS, torch.uint8: _core.DType.uint8}


def unsupported(images: Tensor, weight: Tensor) -> str | None:
    pixels = None if images.dtype == torch.uint8 and images.device.type == "cpu" else unserved("images", images)
    return pixels or unserved("weight", weight)


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
    num_prefix = 0 if prefix is None else prefix.shape[0]
    tokens = weight.new_empty(geometry.result_shape(weight.shape[0], num_prefix))
    mean, std, bias, pos_embed, prefix = map(_contiguous, (mean, std, bias, pos_embed, prefix))
    _core.patch_embed(
        _images(images, geometry),
        _weight(weight, geometry),
        _address(mean),
        _address(std),
        _address(bias),
        _address(pos_embed),
        0 if pos_embed is None else pos_embed.shape[0],
        _address(prefix),
        num_prefix,
        tokens.data_ptr(),
    )
    return tokens


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
    mean, std = _contiguous(mean), _contiguous(std)
    (batch, patches, features), (batch_stride, patch_stride, feature_stride) = grad.shape, grad.stride()
    _core.patch_embed_backward(
        _core.Patches(
            grad.data_ptr(),
            FLOATS[grad.dtype],
            (batch, 1, 1, patches, 1, 1, 1, features),
            (batch_stride, 0, 0, patch_stride, 0, 0, 0, feature_stride),
        ),
        _images(images, geometry),
        _weight(weight, geometry),
        _address(mean),
        _address(std),
        None if d_images is None else _images(d_images, into),
        None if d_weight is None else _weight(d_weight, into),
        _address(d_bias),
    )


def _images(images: Tensor, geometry: PatchGeometry) -> _core.Patches:
    return _core.Patches(images.data_ptr(), _PIXELS[images.dtype], geometry.view_sizes, geometry.view_strides)


def _weight(weight: Tensor, geometry: PatchGeometry) -> _core.Patches:
    sizes = (1, 1, 1, weight.shape[0], *geometry.patch)
    strides = (0, 0, 0, geometry.weight_row_stride, *geometry.weight_strides)
    return _core.Patches(weight.data_ptr(), FLOATS[weight.dtype], sizes, strides)


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()
