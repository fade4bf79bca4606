"""The largest inner products by the compiled core. Signatures and results are those of `reference.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _core
from .._address import address
from .._core_tensors import matrix, unsupported_tensor


def unsupported(rows: Tensor, columns: Tensor) -> str | None:
    return unsupported_tensor("rows", rows) or unsupported_tensor("columns", columns)


def row_maxima(rows: Tensor, columns: Tensor, bias: Tensor | None, starts: Tensor) -> tuple[Tensor, Tensor]:
    shape = len(rows), len(starts) - 1
    maxima, indices = torch.empty(shape), torch.empty(shape, dtype=torch.int32)
    bias, starts = None if bias is None else bias.contiguous(), starts.contiguous()
    _core.row_maxima(
        rows=matrix(rows),
        columns=matrix(columns),
        bias=address(bias),
        starts=starts.data_ptr(),
        segments=shape[1],
        maxima=maxima.data_ptr(),
        indices=indices.data_ptr(),
    )
    return maxima, indices


def gather(weights: Tensor, columns: Tensor, indices: Tensor) -> Tensor:
    sums = torch.empty(len(weights), columns.shape[1])
    _weighted(_core.gather_columns, weights, columns, indices, sums)
    return sums


def scatter(weights: Tensor, rows: Tensor, indices: Tensor, count: int) -> Tensor:
    sums = torch.empty(count, rows.shape[1])
    _weighted(_core.scatter_rows, weights, rows, indices, sums)
    return sums


def _weighted(kernel, weights: Tensor, of: Tensor, indices: Tensor, sums: Tensor) -> None:
    weights, indices = weights.contiguous(), indices.contiguous()
    kernel(
        weights=weights.data_ptr(),
        indices=indices.data_ptr(),
        rows=weights.shape[0],
        segments=weights.shape[1],
        of=matrix(of),
        sums=sums.data_ptr(),
        targets=len(sums),
    )
