"""Registration of patch_embed: schemas, shapes for tracing, and autograd. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._registration import differentiable_once, register
from .geometry import known_patch_geometry, patch_geometry


def _geometry(images, weight, mean, layout, find=known_patch_geometry):
    return find(images, weight, None if mean is None else mean.numel(), layout)


def _forward(images, weight, bias, pos_embed, prefix, mean, std, layout, backend):
    kernels = backends.select("patch_embed", backend, images, weight)
    geometry = _geometry(images, weight, mean, layout)
    return kernels.patch_embed(images, weight, bias, pos_embed, prefix, mean, std, geometry)


def _forward_fake(images, weight, bias, pos_embed, prefix, mean, std, layout, backend):
    tokens = 0 if prefix is None else prefix.shape[0]
    return weight.new_empty(
        _geometry(images, weight, mean, layout, patch_geometry).result_shape(weight.shape[0], tokens)
    )


def _backward(grad, images, weight, mean, std, layout, num_prefix, need_images, need_weight, need_bias, backend):
    kernels = backends.select("patch_embed", backend, images, weight)
    geometry = _geometry(images, weight, mean, layout)
    d_images = torch.zeros_like(images) if need_images else None  # zeros: pixels past the last whole patch
    d_weight = torch.empty_like(weight) if need_weight else None
    d_bias = weight.new_empty(weight.shape[0]) if need_bias else None
    into = _geometry(images if d_images is None else d_images, weight if d_weight is None else d_weight, mean, layout)
    patches = grad.reshape(geometry.batch, -1, grad.shape[-1])[:, num_prefix:]  # (B, N, E)
    kernels.patch_embed_backward(patches, images, weight, mean, std, geometry, d_images, d_weight, d_bias, into)
    return tuple(weight.new_empty(0) if x is None else x for x in (d_images, d_weight, d_bias))


def _backward_fake(grad, images, weight, mean, std, layout, num_prefix, need_images, need_weight, need_bias, backend):
    return (
        torch.empty_like(images) if need_images else weight.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


_forward_op = register(
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? mean, "
    "Tensor? std, str layout, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
_backward_op = register(
    "patch_embed_backward(Tensor grad, Tensor images, Tensor weight, Tensor? mean, Tensor? std, str layout, "
    "int num_prefix, bool need_images, bool need_weight, bool need_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, bias, pos_embed, prefix, mean, std, layout, backend):
        ctx.save_for_backward(images, weight, mean, std)
        ctx.call = layout, 0 if prefix is None else prefix.shape[0], backend
        ctx.positions = 0 if pos_embed is None else pos_embed.shape[0]
        return _forward_op(images, weight, bias, pos_embed, prefix, mean, std, layout, backend)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        images, weight, mean, std = ctx.saved_tensors
        layout, num_prefix, backend = ctx.call
        need_images, need_weight, need_bias, need_positions, need_prefix = ctx.needs_input_grad[:5]
        d_images = d_weight = d_bias = d_positions = d_prefix = None
        if need_images or need_weight or need_bias:
            needs = need_images, need_weight, need_bias
            d_images, d_weight, d_bias = _backward_op(
                grad, images, weight, mean, std, layout, num_prefix, *needs, backend
            )
        if need_positions or need_prefix:
            tokens = grad.sum(0) if grad.dim() == 3 else grad  # (prefix + N, E)
            d_positions = tokens[tokens.shape[0] - ctx.positions :] if need_positions else None
            d_prefix = tokens[:num_prefix] if need_prefix else None
        d_images, d_weight, d_bias = (
            value if need else None
            for value, need in zip((d_images, d_weight, d_bias), (need_images, need_weight, need_bias), strict=True)
        )
        return d_images, d_weight, d_bias, d_positions, d_prefix, None, None, None, None


def patch_embed(images, weight, bias, pos_embed, prefix, mean, std, layout, backend) -> Tensor:
    inputs = (images, weight, bias, pos_embed, prefix)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _PatchEmbed.apply(*inputs, mean, std, layout, backend)
    return _forward_op(*inputs, mean, std, layout, backend)
