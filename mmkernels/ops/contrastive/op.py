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
from .._autograd import OnceDifferentiable, Op, is_forward_mode, looped
from .._registration import register


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


class _Loss(Op):
    """Of one of the losses: forward gives it, and its gradients by the first of the arguments, as many as there are."""

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, *grads = outputs
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)  # zeros of their size, that nobody reads
        ctx.save_for_backward(*inputs[: len(grads)], *grads)
        ctx.others = (None,) * (len(inputs) - len(grads))
        if is_forward_mode():
            ctx.save_for_forward(*inputs[: len(grads)], *grads)

    @staticmethod
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return *[None] * (len(ctx.saved_tensors) // 2), *ctx.others
        tensors = d_loss, *ctx.saved_tensors
        return *_Gradients.call(tensors, *tensors), *ctx.others

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = ctx.saved_tensors[: len(ctx.saved_tensors) // 2]
        one = torch.ones_like(_loss_like(inputs[0]))
        grads = _Gradients.call((one, *ctx.saved_tensors), one, *ctx.saved_tensors)
        along = [(g.to(one.dtype) * t).sum() for g, t in zip(grads, tangents, strict=False) if t is not None]
        return sum(along), *(None for _ in grads)


class _ClipLoss(_Loss):
    @staticmethod
    def forward(image, text, scale, bias, label_smoothing, backend):
        loss, *grads = _clip_grads_op(image, text, scale, label_smoothing, backend)
        return loss, *grads, *([] if bias is None else [torch.zeros_like(bias)])

    @staticmethod
    def without_gradient(image, text, scale, bias, label_smoothing, backend):
        return (_clip_op(image, text, scale, label_smoothing, backend),)

    vmap = looped(forward)


class _SigLipLoss(_Loss):
    forward = staticmethod(_siglip_grads_op)

    @staticmethod
    def without_gradient(*args):
        return (_siglip_op(*args),)

    vmap = looped(_siglip_grads_op)


def _scaled(d_loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """tensors: what the loss depends on, and then its gradients by each."""
    count = len(tensors) // 2
    return tuple((grad * d_loss).to(x.dtype) for x, grad in zip(tensors[:count], tensors[count:], strict=True))


class _Gradients(OnceDifferentiable):
    op = "contrastive losses"
    forward = staticmethod(_scaled)
    vmap = looped(_scaled)


def clip_loss(image, text, scale, bias, label_smoothing, backend) -> Tensor:
    return _ClipLoss.call((image, text, scale, bias), image, text, scale, bias, label_smoothing, backend)[0]


def siglip_loss(image, text, scale, bias, backend) -> Tensor:
    return _SigLipLoss.call((image, text, scale, bias), image, text, scale, bias, backend)[0]
