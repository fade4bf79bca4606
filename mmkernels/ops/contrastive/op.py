"""Registration of the contrastive losses: schemas, shapes for tracing, and autograd. Imports torch only.

Forward computes the gradients with the loss when any is wanted, because that saves work: the logits of a tile are
there, and SigLIP needs no second pass over the pairs at all. Backward then multiplies by the incoming gradient.

The `*_with_grads` ops return gradients of at least float32, whatever the dtype of the inputs, and backward rounds what
the incoming gradient makes of them, once. Rounded before, float16 would lose what a loss scale is there to save, and
make infinities of the scale itself. The price is memory, 4 bytes in place of 2 for each number of half-type features
between forward and backward: 8 N D bytes in all.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ... import backends
from .._autograd import OnceDifferentiable, Op, is_forward_mode, looped
from .._registration import register
from . import distributed
from .pairing import Pairing, Shares


def _kernels(image: Tensor, text: Tensor, backend: str):
    return backends.select("contrastive", backend, image, text)


def _loss_like(image: Tensor) -> Tensor:
    return image.new_empty((), dtype=torch.promote_types(image.dtype, torch.float32))


def _clip(image, text, scale, image_ids, text_ids, same, direction, label_smoothing, backend):
    pairing = _pairing(image, text, image_ids, text_ids, same)
    call = image, text, scale, pairing, Shares.of(pairing, direction), label_smoothing
    return _kernels(image, text, backend).clip_loss(*call)


def _clip_with_grads(image, text, scale, image_ids, text_ids, same, direction, label_smoothing, backend):
    pairing = _pairing(image, text, image_ids, text_ids, same)
    call = image, text, scale, pairing, Shares.of(pairing, direction), label_smoothing
    return _kernels(image, text, backend).clip_loss_with_grads(*call)


def _siglip(image, text, scale, bias, image_ids, text_ids, same, backend):
    pairing = _pairing(image, text, image_ids, text_ids, same)
    return _kernels(image, text, backend).siglip_loss(image, text, scale, bias, pairing, len(image))


def _siglip_with_grads(image, text, scale, bias, image_ids, text_ids, same, backend):
    pairing = _pairing(image, text, image_ids, text_ids, same)
    return _kernels(image, text, backend).siglip_loss_with_grads(image, text, scale, bias, pairing, len(image))


def _pairing(image, text, image_ids, text_ids, same) -> Pairing:
    return Pairing.of(len(image), len(text), image_ids, text_ids, same)


def _grads_like(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)
        for x in inputs
    )


_CLIP = (
    "Tensor image, Tensor text, Tensor scale, Tensor? image_ids, Tensor? text_ids, str same, str direction, "
    "float label_smoothing, str backend"
)
_SIGLIP = (
    "Tensor image, Tensor text, Tensor scale, Tensor bias, Tensor? image_ids, Tensor? text_ids, str same, str backend"
)
_clip_op = register(f"clip_loss({_CLIP}) -> Tensor", _clip, lambda image, *args: _loss_like(image))
_clip_grads_op = register(
    f"clip_loss_with_grads({_CLIP}) -> (Tensor, Tensor, Tensor, Tensor)",
    _clip_with_grads,
    lambda image, text, scale, *args: (_loss_like(image), *_grads_like(image, text, scale)),
)
_siglip_op = register(f"siglip_loss({_SIGLIP}) -> Tensor", _siglip, lambda image, *args: _loss_like(image))
_siglip_grads_op = register(
    f"siglip_loss_with_grads({_SIGLIP}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _siglip_with_grads,
    lambda image, text, scale, bias, *args: (_loss_like(image), *_grads_like(image, text, scale, bias)),
)


# ---- across the ranks of a group, which goes by its name, as in torch's own collectives: opaque to torch.compile


def _clip_across(image, text, scale, image_ids, text_ids, *options, with_grads=False):
    return distributed.clip_loss(image, text, scale, image_ids, text_ids, distributed.Options(*options), with_grads)


def _siglip_across(image, text, scale, bias, image_ids, text_ids, same, *options, with_grads=False):
    options = distributed.Options(same, "both", 0.0, *options)
    return distributed.siglip_loss(image, text, scale, bias, image_ids, text_ids, options, with_grads)


_ACROSS = ", str group, str reduce, str sizes, bool local"
_clip_across_op = register(
    f"clip_loss_across({_CLIP}{_ACROSS}) -> Tensor",
    lambda *args: _clip_across(*args)[0],
    lambda image, *args: _loss_like(image),
)
_clip_across_grads_op = register(
    f"clip_loss_across_with_grads({_CLIP}{_ACROSS}) -> (Tensor, Tensor, Tensor, Tensor)",
    partial(_clip_across, with_grads=True),
    lambda image, text, scale, *args: (_loss_like(image), *_grads_like(image, text, scale)),
)
_siglip_across_op = register(
    f"siglip_loss_across({_SIGLIP}{_ACROSS}) -> Tensor",
    lambda *args: _siglip_across(*args)[0],
    lambda image, *args: _loss_like(image),
)
_siglip_across_grads_op = register(
    f"siglip_loss_across_with_grads({_SIGLIP}{_ACROSS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    partial(_siglip_across, with_grads=True),
    lambda image, text, scale, bias, *args: (_loss_like(image), *_grads_like(image, text, scale, bias)),
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
    def forward(image, text, scale, bias, *args):
        loss, *grads = _clip_grads_op(image, text, scale, *args)
        return loss, *grads, *([] if bias is None else [torch.zeros_like(bias)])

    @staticmethod
    def without_gradient(image, text, scale, bias, *args):
        return (_clip_op(image, text, scale, *args),)

    vmap = looped(forward)


class _SigLipLoss(_Loss):
    forward = staticmethod(_siglip_grads_op)

    @staticmethod
    def without_gradient(*args):
        return (_siglip_op(*args),)

    vmap = looped(_siglip_grads_op)


def _refused_across(*_):
    raise NotImplementedError(
        "mmkernels: a contrastive loss across ranks has a backward pass, no forward mode and no vmap: the ranks would "
        "have to agree on tangents; give group=None for this process's pairs alone"
    )


class _ClipLossAcross(_Loss):
    @staticmethod
    def forward(image, text, scale, bias, *args):
        loss, *grads = _clip_across_grads_op(image, text, scale, *args)
        return loss, *grads, *([] if bias is None else [torch.zeros_like(bias)])

    @staticmethod
    def without_gradient(image, text, scale, bias, *args):
        return (_clip_across_op(image, text, scale, *args),)

    jvp = vmap = staticmethod(_refused_across)


class _SigLipLossAcross(_Loss):
    forward = staticmethod(_siglip_across_grads_op)

    @staticmethod
    def without_gradient(*args):
        return (_siglip_across_op(*args),)

    jvp = vmap = staticmethod(_refused_across)


def _scaled(d_loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """tensors: what the loss depends on, and then its gradients by each."""
    count = len(tensors) // 2
    return tuple((grad * d_loss).to(x.dtype) for x, grad in zip(tensors[:count], tensors[count:], strict=True))


class _Gradients(OnceDifferentiable):
    op = "contrastive losses"
    forward = staticmethod(_scaled)
    vmap = looped(_scaled)


def clip_loss(image, text, scale, bias, *args) -> Tensor:
    return _ClipLoss.call((image, text, scale, bias), image, text, scale, bias, *args)[0]


def clip_loss_across(image, text, scale, bias, *args) -> Tensor:
    return _ClipLossAcross.call((image, text, scale, bias), image, text, scale, bias, *args)[0]


def siglip_loss(image, text, scale, bias, *args) -> Tensor:
    return _SigLipLoss.call((image, text, scale, bias), image, text, scale, bias, *args)[0]


def siglip_loss_across(image, text, scale, bias, *args) -> Tensor:
    return _SigLipLossAcross.call((image, text, scale, bias), image, text, scale, bias, *args)[0]
