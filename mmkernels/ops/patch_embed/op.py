"""Registration of patch_embed: schemas, shapes for tracing, and autograd. Imports torch only."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ... import backends
from .._autograd import Op, is_forward_mode, looped
from .._registration import register
from . import reference
from .geometry import known_patch_geometry, patch_geometry
from .patches import Additions, Gradients, Patches


def _geometry(images, weight, mean, layout, find=known_patch_geometry):
    return find(images, weight, None if mean is None else mean.numel(), layout)


def _patches(images, weight, mean, std, layout) -> Patches:
    return Patches(images, weight, _contiguous(mean), _contiguous(std), _geometry(images, weight, mean, layout))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _kernels(patches: Patches, backend: str) -> ModuleType:
    found, geometry = backends.select("patch_embed", backend, patches.images, patches.weight), patches.geometry
    return found if geometry.batch * geometry.patches else reference  # of nothing, there is nothing to launch


def _forward(images, weight, bias, pos_embed, prefix, mean, std, layout, backend):
    patches = _patches(images, weight, mean, std, layout)
    additions = Additions(*map(_contiguous, (bias, pos_embed, prefix)))
    return _kernels(patches, backend).patch_embed(patches, additions)


def _forward_fake(images, weight, bias, pos_embed, prefix, mean, std, layout, backend):
    tokens = 0 if prefix is None else prefix.shape[0]
    return weight.new_empty(
        _geometry(images, weight, mean, layout, patch_geometry).result_shape(weight.shape[0], tokens)
    )


def _backward(grad, images, weight, mean, std, layout, num_prefix, need_images, need_weight, need_bias, backend):
    patches = _patches(images, weight, mean, std, layout)
    d_images = torch.zeros_like(images) if need_images else None
    d_weight = torch.empty_like(weight) if need_weight else None
    d_bias = weight.new_empty(weight.shape[0]) if need_bias else None
    like = images if d_images is None else d_images, weight if d_weight is None else d_weight
    into = Gradients(d_images, d_weight, d_bias, _geometry(*like, mean, layout))
    tokens = num_prefix + patches.geometry.patches
    grad = grad.reshape(patches.geometry.batch, tokens, grad.shape[-1])[:, num_prefix:]  # (B, N, E)
    _kernels(patches, backend).patch_embed_backward(grad, patches, into)
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


class _PatchEmbed(Op):
    forward = staticmethod(_forward_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        images, weight, _, pos_embed, prefix, mean, std, layout, backend = inputs
        ctx.save_for_backward(images, weight, mean, std)
        ctx.call = layout, 0 if prefix is None else prefix.shape[0], backend
        ctx.positions = 0 if pos_embed is None else pos_embed.shape[0]
        if is_forward_mode():
            ctx.save_for_forward(images, weight, prefix, mean, std)

    @staticmethod
    def backward(ctx, grad):
        images, weight, mean, std = ctx.saved_tensors
        layout, num_prefix, backend = ctx.call
        *needs, need_positions, need_prefix = ctx.needs_input_grad[:5]
        d_positions = d_prefix = None
        found = _gradients(grad, images, weight, mean, std, layout, num_prefix, *needs, backend)
        if need_positions or need_prefix:
            tokens = grad.sum(0) if grad.dim() == 3 else grad  # (prefix + N, E)
            d_positions = tokens[tokens.shape[0] - ctx.positions :] if need_positions else None
            d_prefix = tokens[:num_prefix] if need_prefix else None
        return *found, d_positions, d_prefix, None, None, None, None

    @staticmethod
    def jvp(ctx, t_images, t_weight, t_bias, t_positions, t_prefix, *_):
        images, weight, prefix, mean, std = ctx.saved_tensors
        layout, _, backend = ctx.call
        still = None if prefix is None else torch.zeros_like(prefix)
        along = torch.zeros_like(weight) if t_weight is None else t_weight
        out = patch_embed(
            images, along, t_bias, t_positions, still if t_prefix is None else t_prefix, mean, std, layout, backend
        )
        if t_images is None:
            return out
        return out + patch_embed(t_images, weight, None, None, still, None, None, layout, backend)

    @staticmethod
    def vmap(info, in_dims, images, *rest):
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
            return looped(_forward_op)(info, in_dims, images, *rest)
        images = images.movedim(in_dims[0], 0)
        if images.dim() == 3:  # rows already cut, without a batch axis
            return _forward_op(images, *rest), 0
        return _forward_op(images.flatten(0, 1), *rest).unflatten(0, images.shape[:2]), 0


class _Gradients(Op):
    """By images, weight and bias: products again, and so is what they are differentiated to."""

    forward = staticmethod(_backward_op)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad, images, weight, mean, std, layout, num_prefix, *needs, backend = inputs
        ctx.save_for_backward(grad, images, weight, mean, std)
        ctx.call, ctx.needs = (layout, num_prefix, backend), needs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x, need in zip(outputs, needs, strict=True) if not need))
        if is_forward_mode():
            ctx.save_for_forward(grad, images, weight, mean, std)

    @staticmethod
    def backward(ctx, g_images, g_weight, g_bias):
        grad, images, weight, mean, std = ctx.saved_tensors
        layout, num_prefix, backend = ctx.call
        of_grad, of_images, of_weight = ctx.needs_input_grad[:3]
        given = zip((g_images, g_weight, g_bias), ctx.needs, strict=True)
        g_images, g_weight, g_bias = (g if need else None for g, need in given)
        d_grad = d_images = d_weight = None
        if of_grad:
            prefix = grad.new_zeros(num_prefix, grad.shape[-1]) if num_prefix else None
            along = torch.zeros_like(weight) if g_weight is None else g_weight
            d_grad = patch_embed(images, along, g_bias, None, prefix, mean, std, layout, backend)
            if g_images is not None:
                d_grad = d_grad + patch_embed(g_images, weight, None, None, prefix, None, None, layout, backend)
        if of_images and g_weight is not None:
            d_images = _gradients(grad, images, g_weight, mean, std, layout, num_prefix, True, False, False, backend)[0]
        if of_weight and g_images is not None:
            d_weight = _gradients(grad, g_images, weight, None, None, layout, num_prefix, False, True, False, backend)[
                1
            ]
        return d_grad, d_images, d_weight, *[None] * 8

    @staticmethod
    def jvp(ctx, t_grad, t_images, t_weight, *_):
        grad, images, weight, mean, std = ctx.saved_tensors
        (layout, num_prefix, backend), (of_images, of_weight, _) = ctx.call, ctx.needs
        call = layout, num_prefix
        found = []
        if t_grad is not None:
            found.append(_gradients(t_grad, images, weight, mean, std, *call, *ctx.needs, backend))
        if t_images is not None:
            found.append(_gradients(grad, t_images, weight, None, None, *call, False, of_weight, False, backend))
        if t_weight is not None:
            found.append(_gradients(grad, images, t_weight, mean, std, *call, of_images, False, False, backend))
        likes = images, weight, weight.flatten(1)[:, 0]
        parts = [[x for x in same if x is not None] for same in zip(*found, strict=True)]
        return tuple(
            (sum(same) if same else torch.zeros_like(like)) if need else None
            for same, like, need in zip(parts, likes, ctx.needs, strict=True)
        )

    vmap = looped(_backward_op)


def _gradients(grad, images, weight, mean, std, layout, num_prefix, need_images, need_weight, need_bias, backend):
    needs = need_images, need_weight, need_bias
    if not any(needs):
        return None, None, None
    inputs = grad, images, weight
    found = _Gradients.call(inputs, *inputs, mean, std, layout, num_prefix, *needs, backend)
    return tuple(x if need else None for x, need in zip(found, needs, strict=True))


def patch_embed(images, weight, bias, pos_embed, prefix, mean, std, layout, backend) -> Tensor:
    inputs = images, weight, bias, pos_embed, prefix
    return _PatchEmbed.call(inputs, *inputs, mean, std, layout, backend)
