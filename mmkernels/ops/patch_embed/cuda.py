"""Patch embedding by the CUDA kernels: addresses, sizes and strides out.

Pixels are walked in the order of memory, and the weight, which is small, is copied into that order where it has
another, or where its rows are not aligned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cuda
from .._aligned_rows import aligned_rows
from .._cuda_tensors import launch, unserved
from .._precision import tf32_is_allowed
from .geometry import PatchGeometry
from .pixels import Pixels, weight_view

FLOATS = {
    torch.float32: _cuda.PixelType.float32,
    torch.bfloat16: _cuda.PixelType.bfloat16,
    torch.float16: _cuda.PixelType.float16,
}
TYPES = {**FLOATS, torch.uint8: _cuda.PixelType.uint8}


def unsupported(images: Tensor, weight: Tensor) -> str | None:
    return unserved("images", images, tuple(TYPES)) or unserved("weight", weight, tuple(FLOATS))


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
    features, num_prefix = weight.shape[0], 0 if prefix is None else prefix.shape[0]
    tokens = weight.new_empty(geometry.result_shape(features, num_prefix))
    mean, std, bias, pos_embed, prefix = map(_contiguous, (mean, std, bias, pos_embed, prefix))
    pixels = Pixels.of(images, geometry)
    rows = _weight_rows(weight, geometry, pixels)
    call = _cuda.PatchEmbed(
        images=_patches(images, geometry, pixels),
        normalisation=_normalisation(mean, std, pixels),
        weight=_cuda.Rows(rows.data_ptr(), rows.stride(0)),
        **_product(weight),
        bias=_address(bias),
        positions=_address(pos_embed),
        prefix=_address(prefix),
        tokens=tokens.data_ptr(),
        prefix_rows=num_prefix,
        position_rows=0 if pos_embed is None else pos_embed.shape[0],
    )
    launch(_cuda.patch_embed, call, images=images, weight=rows)
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
    if d_bias is not None:
        torch.sum(grad, (0, 1), out=d_bias)
    if d_images is None and d_weight is None:
        return
    grad = aligned_rows(grad)
    if d_images is not None:
        _write_images_grad(grad, weight, geometry, d_images, into)
    if d_weight is not None:
        _write_weight_grad(grad, images, _contiguous(mean), _contiguous(std), geometry, d_weight, into)


def _write_images_grad(
    grad: Tensor, weight: Tensor, geometry: PatchGeometry, d_images: Tensor, into: PatchGeometry
) -> None:
    pixels = Pixels.of(d_images, into)
    rows = _weight_rows(weight, geometry, pixels)
    call = _cuda.PatchImagesGrad(
        grad=_token_grad(grad),
        weight=_cuda.Rows(rows.data_ptr(), rows.stride(0)),
        **_product(weight),
        d_images=_patches(d_images, into, pixels),
    )
    launch(_cuda.patch_images_grad, call, grad=grad, weight=rows)


def _write_weight_grad(
    grad: Tensor,
    images: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    geometry: PatchGeometry,
    d_weight: Tensor,
    into: PatchGeometry,
) -> None:
    pixels = Pixels.of(images, geometry)
    call = _cuda.PatchWeightGrad(
        grad=_token_grad(grad),
        images=_patches(images, geometry, pixels),
        normalisation=_normalisation(mean, std, pixels),
        **_product(d_weight),
        d_weight=d_weight.data_ptr(),
        d_weight_stride=into.weight_row_stride,
        d_weight_sizes=[into.patch[d] for d in pixels.order],
        d_weight_strides=[into.weight_strides[d] for d in pixels.order],
    )
    workspace = grad.new_empty(call.workspace_bytes, dtype=torch.uint8)
    call.use_workspace(workspace.data_ptr())
    launch(_cuda.patch_weight_grad, call, grad=grad, images=images)


def _patches(images: Tensor, geometry: PatchGeometry, pixels: Pixels) -> _cuda.Patches:
    """It must not outlive the tensor, nor must anything below."""
    return _cuda.Patches(
        data=images.data_ptr(),
        type=TYPES[images.dtype],
        batch=geometry.batch,
        grid=geometry.grid,
        batch_stride=geometry.batch_stride,
        grid_strides=geometry.grid_strides,
        sizes=pixels.sizes,
        strides=pixels.strides,
    )


def _normalisation(mean: Tensor | None, std: Tensor | None, pixels: Pixels) -> _cuda.Normalisation:
    return _cuda.Normalisation(_address(mean), _address(std), 0 if mean is None else len(mean), pixels.channel_inner)


def _weight_rows(weight: Tensor, geometry: PatchGeometry, pixels: Pixels) -> Tensor:
    """(E, K) in the order of the pixels."""
    return aligned_rows(weight_view(weight, geometry, pixels.order).reshape(weight.shape[0], geometry.pixels))


def _token_grad(grad: Tensor) -> _cuda.TokenGrad:
    return _cuda.TokenGrad(grad.data_ptr(), *grad.stride()[:2])


def _product(weight: Tensor) -> dict[str, object]:
    return dict(type=FLOATS[weight.dtype], tf32=tf32_is_allowed(), features=weight.shape[0])


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()
