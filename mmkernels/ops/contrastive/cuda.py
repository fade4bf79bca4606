"""The contrastive losses by the CUDA kernels, and the vendor's products for the gradients of the features.

Signatures and results are those of `reference.py`. Features whose rows are not aligned are copied first, which moves
O(N D) bytes beside kernels that do far more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import _cuda
from .._address import address
from .._aligned_rows import aligned_rows
from .._cuda_tensors import launch, unsupported_tensor
from ._feature_gradients import feature_gradients

# Bytes of dS in work at a time. Few when emulated, so that tests walk chunks.
WORKSPACE = 2**15 if _cuda.emulated else 2**28
TILE = 128  # chunks are whole tiles

Wrap = Callable[["_cuda.LogitRows"], object]  # rows of S into the launcher's call


def unsupported(image: Tensor, text: Tensor) -> str | None:
    return unsupported_tensor("image_features", image) or unsupported_tensor("text_features", text)


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float) -> Tensor:
    return _clip_forward(_Call.of(image, text, scale), label_smoothing)[0]


def clip_loss_with_grads(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    call = _Call.of(image, text, scale)
    loss, rows, columns, diagonal = _clip_forward(call, label_smoothing)

    def with_weights(to: _cuda.LogitRows) -> _cuda.ClipGradient:
        weights = dict(rows=rows.data_ptr(), columns=columns.data_ptr(), diagonal=diagonal.data_ptr())
        return _cuda.ClipGradient(to=to, label_smoothing=label_smoothing, **weights)

    d_image, d_text, means = call.gradients("clip_gradient", with_weights, 1, image.shape[1])
    return loss, d_image, d_text, _like(scale, means[0])


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    call, sums = _Call.of(image, text, scale, bias), _Sums(image, 1)
    call.launch_rows("siglip", _as_it_is, None, 0, len(image), sums)
    return sums.means.reshape(())


def siglip_loss_with_grads(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    call = _Call.of(image, text, scale, bias)
    d_image, d_text, (loss, d_scale, d_bias) = call.gradients("siglip", _as_it_is, 3, image.shape[1])
    return loss.clone(), d_image, d_text, _like(scale, d_scale), _like(bias, d_bias)


def _clip_forward(call: _Call, label_smoothing: float) -> tuple[Tensor, ...]:
    """Loss, the softmax weights (2, N) of rows and of columns, and the diagonal of N dS."""
    image, n = call.image, len(call.image)
    rows, columns = (image.new_empty(2, n, dtype=torch.float32) for _ in range(2))
    diagonal, loss = image.new_empty(n, dtype=torch.float32), image.new_empty((), dtype=torch.float32)
    workspace = image.new_empty(_cuda.clip_forward_workspace(n), dtype=torch.uint8)
    products = None
    if label_smoothing != 0.0:
        products = image.sum(0, dtype=torch.float64) @ call.text.sum(0, dtype=torch.float64)
    forward = _cuda.ClipForward(
        pairs=call.pairs(),
        label_smoothing=label_smoothing,
        products=address(products),
        rows=rows.data_ptr(),
        columns=columns.data_ptr(),
        diagonal=diagonal.data_ptr(),
        loss=loss.data_ptr(),
        workspace=workspace.data_ptr(),
        workspace_bytes=workspace.numel(),
    )
    call.launch("clip_forward", forward)
    return loss, rows, columns, diagonal


class _Sums:
    """What the tiles add up: totals over the chunks so far, and their means over the pairs of an image and its text."""

    def __init__(self, like: Tensor, count: int) -> None:
        self.totals, self.means = (like.new_empty(count, dtype=dtype) for dtype in (torch.float64, torch.float32))


@dataclass(frozen=True)
class _Call:
    """The tensors that a call's pointers point into, aligned and in the types of the kernels."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> _Call:
        parameters = (None if x is None else x.detach().float() for x in (scale, bias))
        return cls(aligned_rows(image), aligned_rows(text), *parameters)

    def pairs(self) -> _cuda.Pairs:
        return _cuda.Pairs(
            image=self.image.data_ptr(),
            image_stride=self.image.stride(0),
            text=self.text.data_ptr(),
            text_stride=self.text.stride(0),
            scale=self.scale.data_ptr(),
            bias=address(self.bias),
            count=len(self.image),
            width=self.image.shape[1],
            bfloat16=self.image.dtype == torch.bfloat16,
        )

    def launch(self, name: str, call: object) -> None:
        parameters = {"logit_scale": self.scale} | ({} if self.bias is None else {"logit_bias": self.bias})
        launch(name, call, image_features=self.image, text_features=self.text, **parameters)

    def launch_rows(self, name: str, wrap: Wrap, ds: Tensor | None, row0: int, rows: int, sums: _Sums) -> None:
        workspace = self.image.new_empty(_cuda.gradient_workspace(len(self.image), rows), dtype=torch.uint8)
        to = _cuda.LogitRows(
            pairs=self.pairs(),
            row0=row0,
            row_count=rows,
            ds=address(ds),
            ds_stride=0 if ds is None else ds.stride(0),
            totals=sums.totals.data_ptr(),
            means=sums.means.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace.numel(),
        )
        self.launch(name, wrap(to))

    def gradients(self, name: str, wrap: Wrap, num_sums: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of both features, and the means of the sums that the tiles leave."""
        sums = _Sums(self.image, num_sums)

        def write_rows(ds: Tensor, row0: int) -> None:
            self.launch_rows(name, wrap, ds, row0, len(ds), sums)

        step = max(WORKSPACE // (2 * len(self.image)) // TILE, 1) * TILE
        return *feature_gradients(write_rows, self.image, self.text, self.scale, width, step), sums.means


def _as_it_is(to: _cuda.LogitRows) -> _cuda.LogitRows:
    return to


def _like(parameter: Tensor, mean: Tensor) -> Tensor:
    return mean.to(torch.promote_types(parameter.dtype, torch.float32), copy=True).reshape(parameter.shape)
