"""Patch embedding by the CUDA kernels: addresses, sizes and strides out.

Pixels are walked in the order of memory, and the weight, which is small, is copied into that order where it has
another, or where its rows are not aligned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cuda
from .._address import address
from .._aligned_rows import aligned_rows
from .._cuda_tensors import launch, unsupported_tensor
from .._precision import tf32_is_allowed
from .geometry import PatchGeometry
from .patches import Additions, Gradients, Patches
from .pixels import Pixels, weight_rows

FLOATS = {
    torch.float32: _cuda.PixelType.float32,
    torch.bfloat16: _cuda.PixelType.bfloat16,
    torch.float16: _cuda.PixelType.float16,
}
TYPES = {**FLOATS, torch.uint8: _cuda.PixelType.uint8}


def unsupported(images: Tensor, weight: Tensor) -> str | None:
    return unsupported_tensor("images", images, tuple(TYPES)) or unsupported_tensor("weight", weight, tuple(FLOATS))


def patch_embed(patches: Patches, additions: Additions) -> Tensor:
    images, weight, *_, geometry = patches
    tokens = weight.new_empty(geometry.result_shape(weight.shape[0], additions.num_prefix))
    pixels = Pixels.of(images, geometry)
    rows = weight_rows(weight, geometry, pixels)
    call = _cuda.PatchEmbed(
        images=_patches(images, geometry, pixels),
        normalisation=_normalisation(patches, pixels),
        weight=_cuda.Rows(rows.data_ptr(), rows.stride(0)),
        **_product(weight),
        bias=address(additions.bias),
        positions=address(additions.positions),
        prefix=address(additions.prefix),
        tokens=tokens.data_ptr(),
        prefix_rows=additions.num_prefix,
        position_rows=additions.num_positions,
    )
    launch("patch_embed", call, images=images, weight=rows)
    return tokens


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
    pixels = Pixels.of(into.images, into.geometry)
    rows = weight_rows(patches.weight, patches.geometry, pixels)
    call = _cuda.PatchImagesGrad(
        grad=_token_grad(grad),
        weight=_cuda.Rows(rows.data_ptr(), rows.stride(0)),
        **_product(patches.weight),
        d_images=_patches(into.images, into.geometry, pixels),
    )
    launch("patch_images_grad", call, grad=grad, weight=rows)


def _write_weight_grad(grad: Tensor, patches: Patches, into: Gradients) -> None:
    images, _, _, _, geometry = patches
    pixels, d_weight, target = Pixels.of(images, geometry), into.weight, into.geometry
    call = _cuda.PatchWeightGrad(
        grad=_token_grad(grad),
        images=_patches(images, geometry, pixels),
        normalisation=_normalisation(patches, pixels),
        **_product(d_weight),
        d_weight=d_weight.data_ptr(),
        d_weight_stride=target.weight_row_stride,
        d_weight_sizes=[target.patch[d] for d in pixels.order],
        d_weight_strides=[target.weight_strides[d] for d in pixels.order],
    )
    workspace = grad.new_empty(call.workspace_bytes, dtype=torch.uint8)
    call.use_workspace(workspace.data_ptr())
    launch("patch_weight_grad", call, grad=grad, images=images)


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


def _normalisation(patches: Patches, pixels: Pixels) -> _cuda.Normalisation:
    channels = 0 if patches.mean is None else len(patches.mean)
    return _cuda.Normalisation(address(patches.mean), address(patches.std), channels, pixels.channel_inner)


def _token_grad(grad: Tensor) -> _cuda.TokenGrad:
    return _cuda.TokenGrad(grad.data_ptr(), *grad.stride()[:2])


def _product(weight: Tensor) -> dict[str, object]:
    return dict(type=FLOATS[weight.dtype], tf32=tf32_is_allowed(), features=weight.shape[0])
