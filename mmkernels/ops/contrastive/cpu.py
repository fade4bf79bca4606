"""The contrastive losses by the compiled core. Signatures and results are those of `reference.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _core
from .._core_tensors import matrix, unsupported_tensor


def unsupported(image: Tensor, text: Tensor) -> str | None:
    return unsupported_tensor("image_features", image) or unsupported_tensor("text_features", text)


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float) -> Tensor:
    loss, _ = _core.clip_loss(
        image=matrix(image),
        text=matrix(text),
        scale=scale.item(),
        label_smoothing=label_smoothing,
        d_image=None,
        d_text=None,
    )
    return _loss(loss)


def clip_loss_with_grads(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    d_image, d_text = _grad_like(image), _grad_like(text)
    loss, d_scale = _core.clip_loss(
        image=matrix(image),
        text=matrix(text),
        scale=scale.item(),
        label_smoothing=label_smoothing,
        d_image=matrix(d_image),
        d_text=matrix(d_text),
    )
    return _loss(loss), d_image, d_text, _full_like(scale, d_scale)


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    loss, _, _ = _core.siglip_loss(
        image=matrix(image), text=matrix(text), scale=scale.item(), bias=bias.item(), d_image=None, d_text=None
    )
    return _loss(loss)


def siglip_loss_with_grads(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    d_image, d_text = _grad_like(image), _grad_like(text)
    loss, d_scale, d_bias = _core.siglip_loss(
        image=matrix(image),
        text=matrix(text),
        scale=scale.item(),
        bias=bias.item(),
        d_image=matrix(d_image),
        d_text=matrix(d_text),
    )
    return _loss(loss), d_image, d_text, _full_like(scale, d_scale), _full_like(bias, d_bias)


def _grad_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)


def _loss(value: float) -> Tensor:
    return torch.full((), value, dtype=torch.float32)  # half the time of torch.tensor


def _full_like(x: Tensor, value: float) -> Tensor:
    return torch.full(x.shape, value, dtype=torch.promote_types(x.dtype, torch.float32))
