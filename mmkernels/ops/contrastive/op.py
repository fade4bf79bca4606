"""Registration of the contrastive losses: schemas, shapes for tracing, and autograd. Imports torch only.

Forward computes the gradients with the loss when any is wanted, because that saves work: the logits of a tile are
there, and SigLIP needs no second pass over the pairs at all. Backward then multiplies by the incoming gradient.

The `*_with_grads` ops return gradients of at least float32, whatever the dtype of the inputs, and backward rounds what
the incoming gradient makes of them, once. Rounded before, float16 would lose what a loss scale is there to save, and
make infinities of the scale itself. The price is memory, 4 bytes in place of 2 for each number of half-type features
between forward and backward: 8 N D bytes in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._registration import differentiable_once, register


def _kernels(image: Tensor, text: Tensor, backend: str):
    return backends.select("contrastive", backend, image, text)


def _loss_like(image: Tensor) -> Tensor:
    return image.new_empty((), dtype=torch.promote_types(image.dtype, torch.float32))


def _clip(image, text, scale, label_smoothing, backend):
    return _kernels(image, text, backend).clip_loss(image, text, scale, label_smoothing)


def _clip_with_grads(image, text, scale, label_smoothing, backend):
    return _kernels(image, text, backend).clip_loss_with_grads(image, text, scale, label_smoothing)


def _siglip(image, text, scale, bias, backend):
    return _kernels(image, text, backend).siglip_loss(image, text, scale, bias)


def _siglip_with_grads(image, text, scale, bias, backend):
    return _kernels(image, text, backend).siglip_loss_with_grads(image, text, scale, bias)


def _grads_like(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)
        for x in inputs
    )


def _scaled(ctx, grad: Tensor) -> tuple[Tensor, ...]:
    """The saved gradients times the incoming one, in the dtypes of their inputs."""
    return tuple((saved * grad).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))


_clip_op = register(
    "clip_loss(Tensor image, Tensor text, Tensor scale, float label_smoothing, str backend) -> Tensor",
    _clip,
    lambda image, text, scale, label_smoothing, backend: _loss_like(image),
)
_clip_grads_op = register(
    "clip_loss_with_grads(Tensor image, Tensor text, Tensor scale, float label_smoothing, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _clip_with_grads,
    lambda image, text, scale, label_smoothing, backend: (_loss_like(image), *_grads_like(image, text, scale)),
)
_siglip_op = register(
    "siglip_loss(Tensor image, Tensor text, Tensor scale, Tensor bias, str backend) -> Tensor",
    _siglip,
    lambda image, text, scale, bias, backend: _loss_like(image),
)
_siglip_grads_op = register(
    "siglip_loss_with_grads(Tensor image, Tensor text, Tensor scale, Tensor bias, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _siglip_with_grads,
    lambda image, text, scale, bias, backend: (_loss_like(image), *_grads_like(image, text, scale, bias)),
)


class _ClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, bias, label_smoothing, backend):
        loss, *grads = _clip_grads_op(image, text, scale, label_smoothing, backend)
        ctx.save_for_backward(*grads)
        ctx.dtypes = image.dtype, text.dtype, scale.dtype
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        bias = None if ctx.bias is None else grad.new_zeros(ctx.bias[0], dtype=ctx.bias[1])
        return *_scaled(ctx, grad), bias, None, None


class _SigLipLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, bias, backend):
        loss, *grads = _siglip_grads_op(image, text, scale, bias, backend)
        ctx.save_for_backward(*grads)
        ctx.dtypes = image.dtype, text.dtype, scale.dtype, bias.dtype
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        return *_scaled(ctx, grad), None


def _wants_grad(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def clip_loss(image, text, scale, bias, label_smoothing, backend) -> Tensor:
    if _wants_grad(image, text, scale, bias):
        return _ClipLoss.apply(image, text, scale, bias, label_smoothing, backend)
    return _clip_op(image, text, scale, label_smoothing, backend)


def siglip_loss(image, text, scale, bias, backend) -> Tensor:
    if _wants_grad(image, text, scale, bias):
        return _SigLipLoss.apply(image, text, scale, bias, backend)
    return _siglip_op(image, text, scale, bias, backend)
