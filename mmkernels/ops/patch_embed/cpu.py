"""Patch embedding by the compiled core: addresses, sizes and strides out, nothing copied."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _core
from .._address import address
from .._core_tensors import FLOATS, unsupported_tensor
from .geometry import PatchGeometry
from .patches import Additions, Gradients, Patches

_PIXELS = {**FLOATS, torch.uint8: _core.DType.uint8}


def unsupported(images: Tensor, weight: Tensor) -> str | None:
    return unsupported_tensor("images", images, tuple(_PIXELS)) or unsupported_tensor("weight", weight)


def patch_embed(patches: Patches, additions: Additions) -> Tensor:
    features = patches.weight.shape[0]
    tokens = patches.weight.new_empty(patches.geometry.result_shape(features, additions.num_prefix))
    _core.patch_embed(
        **_product(patches),
        bias=address(additions.bias),
        positions=address(additions.positions),
        position_rows=additions.num_positions,
        prefix=address(additions.prefix),
        prefix_rows=additions.num_prefix,
        tokens=tokens.data_ptr(),
    )
    return tokens


def patch_embed_backward(grad: Tensor, patches: Patches, into: Gradients) -> None:
    """grad: (B, N, E)."""
    (batch, count, features), (batch_stride, patch_stride, feature_stride) = grad.shape, grad.stride()
    _core.patch_embed_backward(
        grad=_core.Patches(
            grad.data_ptr(),
            FLOATS[grad.dtype],
            (batch, 1, 1, count, 1, 1, 1, features),
            (batch_stride, 0, 0, patch_stride, 0, 0, 0, feature_stride),
        ),
        **_product(patches),
        d_images=None if into.images is None else _images(into.images, into.geometry),
        d_weight=None if into.weight is None else _weight(into.weight, into.geometry),
        d_bias=address(into.bias),
    )


def _product(patches: Patches) -> dict[str, _core.Patches | int]:
    images, weight, mean, std, geometry = patches
    operands = {"images": _images(images, geometry), "weight": _weight(weight, geometry)}
    return operands | {"mean": address(mean), "std": address(std)}


def _images(images: Tensor, geometry: PatchGeometry) -> _core.Patches:
    return _core.Patches(images.data_ptr(), _PIXELS[images.dtype], geometry.view_sizes, geometry.view_strides)


def _weight(weight: Tensor, geometry: PatchGeometry) -> _core.Patches:
    sizes = (1, 1, 1, weight.shape[0], *geometry.patch)
    strides = (0, 0, 0, geometry.weight_row_stride, *geometry.weight_strides)
    return _core.Patches(weight.data_ptr(), FLOATS[weight.dtype], sizes, strides)
