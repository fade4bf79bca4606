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
from ._feature_gradients import feature_gradients, own_slopes
from .pairing import Pairing, Shares
from .smoothing import FeatureSums

# Bytes of dS in work at a time. Few when emulated, so that tests walk chunks.
WORKSPACE = 2**15 if _cuda.emulated else 2**28
TILE = 128  # chunks are whole tiles

_SAME = {None: _cuda.Same.nothing, "positives": _cuda.Same.positive, "ignored": _cuda.Same.ignored}

Wrap = Callable[["_cuda.LogitRows"], object]  # rows of S into the launcher's call


def unsupported(image: Tensor, text: Tensor) -> str | None:
    return unsupported_tensor("image_features", image) or unsupported_tensor("text_features", text)


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, shares: Shares, label_smoothing: float
) -> Tensor:
    feature_sums = FeatureSums.of(image, text, pairing) if label_smoothing else None
    return _clip_weights(_Call.of(pairing, image, text, scale), shares, label_smoothing, feature_sums)[0]


def clip_loss_with_grads(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, shares: Shares, label_smoothing: float
) -> tuple[Tensor, ...]:
    call = _Call.of(pairing, image, text, scale)
    feature_sums = FeatureSums.of(image, text, pairing) if label_smoothing else None
    loss, rows, columns, own = _clip_weights(call, shares, label_smoothing, feature_sums)
    d_image, d_text, (d_scale,) = call.clip_gradients(rows, columns, own, shares.count, image.shape[1])
    if feature_sums is not None:
        sizes = len(image), len(text)
        less = feature_sums.take_off(scale, shares, label_smoothing, sizes, pairing.counted, d_image, d_text)
        d_scale = d_scale - less
    return loss, d_image, d_text, _like(scale, d_scale)


def clip_statistics(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, rows: Tensor, columns: Tensor
) -> None:
    _Call.of(pairing, image, text, scale).clip_statistics(rows, columns, add=True)


def clip_gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairing: Pairing,
    rows: Tensor,
    columns: Tensor,
    count: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call.of(pairing, image, text, scale)
    own = None if pairing.by_ids else own_slopes(pairing, rows, columns)
    d_image, d_text, (d_scale,) = call.clip_gradients(rows, columns, own, count, image.shape[1])
    return d_image, d_text, d_scale.double()


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairing: Pairing, count: float) -> Tensor:
    call, sums = _Call.of(pairing, image, text, scale, bias), _Sums(image, 1)
    for row0, rows in pairing.chunks(len(image), len(text), len(image)):
        call.launch_rows("siglip", _as_it_is, None, row0, rows, count, sums)
    return sums.means.reshape(())


def siglip_loss_with_grads(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairing: Pairing, count: float
) -> tuple[Tensor, ...]:
    call = _Call.of(pairing, image, text, scale, bias)
    found = call.gradients("siglip", _as_it_is, count, 3, image.shape[1])
    d_image, d_text, (loss, d_scale, d_bias) = found
    return loss.clone(), d_image, d_text, _like(scale, d_scale), _like(bias, d_bias)


def _clip_weights(
    call: _Call, shares: Shares, label_smoothing: float, feature_sums: FeatureSums | None
) -> tuple[Tensor | None, ...]:
    """Loss, the weights of rows and of columns, and count dS of own pairs."""
    image, text, by_ids = call.image, call.text, call.pairing.by_ids
    rows, columns = (image.new_empty(4 if by_ids else 3, len(x), dtype=torch.float32) for x in (image, text))
    own = None if by_ids else image.new_empty(len(image), dtype=torch.float32)
    loss = image.new_empty((), dtype=torch.float32)
    call.clip_statistics(rows, columns, add=False)
    products = None if feature_sums is None else torch.stack(feature_sums.products())
    numbers, on_device = (shares.row, shares.column, shares.count), None
    if by_ids:
        on_device = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=image.device) for x in numbers])
        numbers = 0.0, 0.0, 0.0
    row_share, column_share, count = numbers
    weights = _cuda.ClipWeights(
        pairs=call.pairs(),
        label_smoothing=label_smoothing,
        row_share=row_share,
        column_share=column_share,
        count=count,
        shares=address(on_device),
        products=address(products),
        rows=rows.data_ptr(),
        columns=columns.data_ptr(),
        own=address(own),
        loss=loss.data_ptr(),
    )
    call.launch("clip_weights", weights)
    return loss, rows, columns, own


class _Sums:
    """What the tiles add up: totals over the chunks so far, and these divided by what the loss is divided by."""

    def __init__(self, like: Tensor, count: int) -> None:
        self.totals, self.means = (like.new_empty(count, dtype=dtype) for dtype in (torch.float64, torch.float32))


@dataclass(frozen=True)
class _Call:
    """The tensors that a call's pointers point into, aligned and in the types of the kernels."""

    pairing: Pairing
    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, pairing: Pairing, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> _Call:
        parameters = (None if x is None else x.detach().float() for x in (scale, bias))
        return cls(pairing, aligned_rows(image), aligned_rows(text), *parameters)

    def pairs(self) -> _cuda.Pairs:
        return _cuda.Pairs(
            image=self.image.data_ptr(),
            image_stride=self.image.stride(0),
            text=self.text.data_ptr(),
            text_stride=self.text.stride(0),
            scale=self.scale.data_ptr(),
            bias=address(self.bias),
            images=len(self.image),
            texts=len(self.text),
            width=self.image.shape[1],
            bfloat16=self.image.dtype == torch.bfloat16,
            offset=self.pairing.offset,
            first=self.pairing.first,
            last=self.pairing.last,
            same=_SAME[self.pairing.same],
            image_ids=address(self.pairing.image_ids),
            text_ids=address(self.pairing.text_ids),
            image_counts=address(self.pairing.image_counts),
            text_counts=address(self.pairing.text_counts),
        )

    def launch(self, name: str, call: object) -> None:
        parameters = {"logit_scale": self.scale} | ({} if self.bias is None else {"logit_bias": self.bias})
        launch(name, call, image_features=self.image, text_features=self.text, **parameters)

    def clip_statistics(self, rows: Tensor, columns: Tensor, add: bool) -> None:
        size = _cuda.clip_statistics_workspace(self.pairs())
        workspace = self.image.new_empty(size, dtype=torch.uint8)
        statistics = _cuda.ClipStatistics(
            pairs=self.pairs(),
            rows=rows.data_ptr(),
            columns=columns.data_ptr(),
            add=add,
            workspace=workspace.data_ptr(),
            workspace_bytes=size,
        )
        self.launch("clip_statistics", statistics)

    def clip_gradients(
        self, rows: Tensor, columns: Tensor, own: Tensor | None, count: float | Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        def with_weights(to: _cuda.LogitRows) -> _cuda.ClipGradient:
            return _cuda.ClipGradient(to=to, rows=rows.data_ptr(), columns=columns.data_ptr(), own=address(own))

        return self.gradients("clip_gradient", with_weights, count, 1, width)

    def launch_rows(
        self, name: str, wrap: Wrap, ds: Tensor | None, row0: int, rows: int, count: float, sums: _Sums
    ) -> None:
        workspace = self.image.new_empty(_cuda.gradient_workspace(len(self.text), rows), dtype=torch.uint8)
        to = _cuda.LogitRows(
            pairs=self.pairs(),
            row0=row0,
            row_count=rows,
            ds=address(ds),
            ds_stride=0 if ds is None else ds.stride(0),
            count=count,
            totals=sums.totals.data_ptr(),
            means=sums.means.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace.numel(),
        )
        self.launch(name, wrap(to))

    def gradients(
        self, name: str, wrap: Wrap, count: float | Tensor, num_sums: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of both features, and the means of the sums that the tiles leave."""
        sums, on_device = _Sums(self.image, num_sums), isinstance(count, Tensor)

        def write_rows(ds: Tensor, row0: int) -> None:
            self.launch_rows(name, wrap, ds, row0, len(ds), 1.0 if on_device else count, sums)

        n, m = len(self.image), len(self.text)
        chunks = self.pairing.chunks(n, m, max(WORKSPACE // (2 * m) // TILE, 1) * TILE)
        gradients = feature_gradients(write_rows, self.image, self.text, self.scale, count, width, chunks)
        return *gradients, sums.totals / count if on_device else sums.means


def _as_it_is(to: _cuda.LogitRows) -> _cuda.LogitRows:
    return to


def _like(parameter: Tensor, mean: Tensor) -> Tensor:
    return mean.to(torch.promote_types(parameter.dtype, torch.float32), copy=True).reshape(parameter.shape)
