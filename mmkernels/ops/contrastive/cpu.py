"""The contrastive losses by the compiled core. Signatures and results are those of `reference.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _core
from .._address import address
from .._core_tensors import matrix, unsupported_tensor
from .pairing import Pairing, Shares
from .smoothing import FeatureSums

_SAME = {None: _core.Same.nothing, "positives": _core.Same.positive, "ignored": _core.Same.ignored}


def unsupported(image: Tensor, text: Tensor) -> str | None:
    return unsupported_tensor("image_features", image) or unsupported_tensor("text_features", text)


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, shares: Shares, label_smoothing: float
) -> Tensor:
    return _clip_loss(image, text, scale, pairing, shares, label_smoothing, None, None)[0]


def clip_loss_with_grads(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, shares: Shares, label_smoothing: float
) -> tuple[Tensor, ...]:
    d_image, d_text = _grad_like(image), _grad_like(text)
    loss, d_scale = _clip_loss(image, text, scale, pairing, shares, label_smoothing, d_image, d_text)
    return loss, d_image, d_text, _full_like(scale, d_scale)


def clip_statistics(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, rows: Tensor, columns: Tensor
) -> None:
    _core.clip_statistics(
        rectangle=_rectangle(image, text, scale, pairing), rows=rows.data_ptr(), columns=columns.data_ptr()
    )


def clip_gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairing: Pairing,
    rows: Tensor,
    columns: Tensor,
    count: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    d_image, d_text = _grad_like(image), _grad_like(text)
    d_scale = _core.clip_gradients(
        rectangle=_rectangle(image, text, scale, pairing),
        rows=rows.data_ptr(),
        columns=columns.data_ptr(),
        count=float(count),
        d_image=matrix(d_image),
        d_text=matrix(d_text),
    )
    return d_image, d_text, torch.full((), d_scale, dtype=torch.float64)


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairing: Pairing, count: float) -> Tensor:
    loss, _, _ = _siglip_loss(image, text, scale, bias, pairing, count, None, None)
    return _loss(loss)


def siglip_loss_with_grads(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairing: Pairing, count: float
) -> tuple[Tensor, ...]:
    d_image, d_text = _grad_like(image), _grad_like(text)
    loss, d_scale, d_bias = _siglip_loss(image, text, scale, bias, pairing, count, matrix(d_image), matrix(d_text))
    return _loss(loss), d_image, d_text, _full_like(scale, d_scale), _full_like(bias, d_bias)


def _clip_loss(image, text, scale, pairing, shares, label_smoothing, d_image, d_text) -> tuple[Tensor, float]:
    loss, d_scale = _core.clip_loss(
        rectangle=_rectangle(image, text, scale, pairing),
        count=float(shares.count),
        row_share=float(shares.row),
        column_share=float(shares.column),
        label_smoothing=label_smoothing,
        d_image=None if d_image is None else matrix(d_image),
        d_text=None if d_text is None else matrix(d_text),
    )
    if label_smoothing:
        sums, sizes = FeatureSums.of(image, text, pairing), (len(image), len(text))
        loss -= sums.loss(scale, shares, label_smoothing, *sizes).item()
        if d_image is not None:
            d_scale -= sums.take_off(scale, shares, label_smoothing, sizes, pairing.counted, d_image, d_text).item()
    return _loss(loss), d_scale


def _siglip_loss(image, text, scale, bias, pairing, count, d_image, d_text) -> tuple[float, float, float]:
    return _core.siglip_loss(
        rectangle=_rectangle(image, text, scale, pairing),
        bias=bias.item(),
        count=count,
        d_image=d_image,
        d_text=d_text,
    )


def _rectangle(image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing) -> _core.Rectangle:
    """It must not outlive the tensors."""
    core_pairing = _core.Pairing(
        offset=pairing.offset,
        first=pairing.first,
        last=pairing.last,
        same=_SAME[pairing.same],
        image_ids=address(pairing.image_ids),
        text_ids=address(pairing.text_ids),
        image_counts=address(pairing.image_counts),
        text_counts=address(pairing.text_counts),
    )
    return _core.Rectangle(image=matrix(image), text=matrix(text), scale=scale.item(), pairing=core_pairing)


def _grad_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)


def _loss(value: float) -> Tensor:
    return torch.full((), value, dtype=torch.float32)  # half the time of torch.tensor


def _full_like(x: Tensor, value: float) -> Tensor:
    return torch.full(x.shape, value, dtype=torch.promote_types(x.dtype, torch.float32))
