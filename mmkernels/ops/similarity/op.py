"""Registration of the largest inner products: schemas, shapes for tracing, and autograd. Imports torch only.

Inside, rows are (R, D), columns (C, D), of one dtype; starts are int32 (S + 1), of segments of columns; weights and
sums have at least float32. See reference.py for what each computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._autograd import Op, is_forward_mode, looped
from .._registration import register


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _row_maxima(rows, columns, bias, starts, backend):
    return backends.select("similarity", backend, rows, columns).row_maxima(rows, columns, bias, starts)


def _row_maxima_fake(rows, columns, bias, starts, backend):
    shape = rows.shape[0], starts.shape[0] - 1
    return rows.new_empty(shape, dtype=_wide(rows)), rows.new_empty(shape, dtype=torch.int32)


def _gather(weights, columns, indices, backend):
    return backends.select("similarity", backend, weights, columns).gather(weights, columns, indices)


def _gather_fake(weights, columns, indices, backend):
    return weights.new_empty(weights.shape[0], columns.shape[1])


def _scatter(weights, rows, indices, count, backend):
    return backends.select("similarity", backend, weights, rows).scatter(weights, rows, indices, count)


def _scatter_fake(weights, rows, indices, count, backend):
    return weights.new_empty(count, rows.shape[1])


_row_maxima_op = register(
    "row_maxima(Tensor rows, Tensor columns, Tensor? bias, Tensor starts, str backend) -> (Tensor, Tensor)",
    _row_maxima,
    _row_maxima_fake,
)
_gather_op = register(
    "gather_columns(Tensor weights, Tensor columns, Tensor indices, str backend) -> Tensor", _gather, _gather_fake
)
_scatter_op = register(
    "scatter_rows(Tensor weights, Tensor rows, Tensor indices, SymInt count, str backend) -> Tensor",
    _scatter,
    _scatter_fake,
)


class _RowMaxima(Op):
    """A maximum is the product where it is found: its derivatives are the product's."""

    forward = staticmethod(_row_maxima_op)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        rows, columns, _, _, ctx.backend = inputs
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, columns, outputs[1])
        if is_forward_mode():
            ctx.save_for_forward(rows, columns, outputs[1])

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None, None, None
        rows, columns, indices = ctx.saved_tensors
        d_rows = gather(grad, columns, indices, ctx.backend).to(rows.dtype) if ctx.needs_input_grad[0] else None
        d_columns = None
        if ctx.needs_input_grad[1]:
            d_columns = scatter(grad, rows, indices, columns.shape[0], ctx.backend).to(columns.dtype)
        return d_rows, d_columns, None, None, None

    @staticmethod
    def jvp(ctx, t_rows, t_columns, *_):
        rows, columns, indices = ctx.saved_tensors
        return _sum_of(_picked(t_rows, columns, indices), _picked(rows, t_columns, indices)), None

    vmap = looped(_row_maxima_op)


class _Gather(Op):
    forward = staticmethod(_gather_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        if is_forward_mode():
            ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        weights, columns, indices = ctx.saved_tensors
        d_weights = _picked(grad, columns, indices) if ctx.needs_input_grad[0] else None
        d_columns = None
        if ctx.needs_input_grad[1]:
            d_columns = scatter(weights, grad, indices, columns.shape[0], ctx.backend).to(columns.dtype)
        return d_weights, d_columns, None, None

    @staticmethod
    def jvp(ctx, t_weights, t_columns, *_):
        weights, columns, indices = ctx.saved_tensors
        along_weights = None if t_weights is None else gather(t_weights, columns, indices, ctx.backend)
        along_columns = None if t_columns is None else gather(weights, t_columns, indices, ctx.backend)
        return _sum_of(along_weights, along_columns)

    vmap = looped(_gather_op)


class _Scatter(Op):
    forward = staticmethod(_scatter_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.count, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        if is_forward_mode():
            ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        weights, rows, indices = ctx.saved_tensors
        d_weights = _picked(rows, grad, indices) if ctx.needs_input_grad[0] else None
        d_rows = gather(weights, grad, indices, ctx.backend).to(rows.dtype) if ctx.needs_input_grad[1] else None
        return d_weights, d_rows, None, None, None

    @staticmethod
    def jvp(ctx, t_weights, t_rows, *_):
        weights, rows, indices = ctx.saved_tensors
        call = indices, ctx.count, ctx.backend
        along_weights = None if t_weights is None else scatter(t_weights, rows, *call)
        along_rows = None if t_rows is None else scatter(weights, t_rows, *call)
        return _sum_of(along_weights, along_rows)

    vmap = looped(_scatter_op)


def _sum_of(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _picked(rows: Tensor | None, columns: Tensor | None, indices: Tensor) -> Tensor | None:
    """<row r, column indices_rs>, zero for an index that is none: what weights are differentiated to."""
    if rows is None or columns is None:
        return None
    wide = torch.promote_types(_wide(rows), columns.dtype)
    rows, columns = rows.to(wide), columns.to(wide)
    known = (indices >= 0) & (indices < columns.shape[0])
    places = torch.where(known, indices, 0)
    if not columns.shape[0] or not indices.shape[1]:
        return rows.new_zeros(indices.shape)
    products = torch.stack([(rows * columns[place]).sum(1) for place in places.unbind(1)], 1)
    return torch.where(known, products, 0)


def gather(weights: Tensor, columns: Tensor, indices: Tensor, backend: str) -> Tensor:
    return _Gather.call((weights, columns), weights, columns, indices, backend)


def scatter(weights: Tensor, rows: Tensor, indices: Tensor, count: int, backend: str) -> Tensor:
    return _Scatter.call((weights, rows), weights, rows, indices, count, backend)


# ---- the public functions


def nearest_code(x: Tensor, codes: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """|x - e|^2 is least where <x, e> - |e|^2 / 2 is largest."""
    with torch.no_grad():
        bias = codes.to(_wide(codes)).square().sum(1) / -2
        starts = torch.tensor([0, codes.shape[0]], dtype=torch.int32, device=x.device)
        _, indices = _row_maxima_op(x.detach(), codes.detach(), bias.detach(), starts, backend)
    ones = torch.ones(x.shape[0], 1, dtype=_wide(codes), device=x.device)
    return indices[:, 0].long(), gather(ones, codes, indices, backend)


def max_similarity(texts: Tensor, cu_texts: Tensor, images: Tensor, cu_images: Tensor, backend: str) -> Tensor:
    maxima, _ = _RowMaxima.call((texts, images), texts, images, None, cu_images, backend)
    of_token = torch.arange(texts.shape[0], dtype=torch.int32, device=texts.device)
    text = torch.searchsorted(cu_texts, of_token, right=True, out_int32=True) - 1
    ones = torch.ones(texts.shape[0], 1, dtype=maxima.dtype, device=texts.device)
    return scatter(ones, maxima, text[:, None], cu_texts.shape[0] - 1, backend)
