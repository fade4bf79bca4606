"""The largest inner products in plain PyTorch, all of them spelled out: the definition of right.

With rows a_r, columns b_c, a bias of each column, and segments of columns [starts_s, starts_s+1):

    maxima_rs = max over c in segment s of (<a_r, b_c> + bias_c),  indices_rs = the first c where it is (NaN is largest)

and what derivatives by rows and columns are made of, with weights w_rs:

    gathered_r = sum_s w_rs b_indices_rs,      scattered_c = sum over r, s with indices_rs = c of w_rs a_r
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def unsupported(rows: Tensor, columns: Tensor) -> str | None:
    return None


def row_maxima(rows: Tensor, columns: Tensor, bias: Tensor | None, starts: Tensor) -> tuple[Tensor, Tensor]:
    """(R, S) of at least float32, and int32, -1 where a segment is empty, whose maximum is -inf."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    products = rows.to(wide) @ columns.to(wide).T
    if bias is not None:
        products = products + bias
    places = torch.arange(len(columns), dtype=torch.int32, device=rows.device)
    shape = len(rows), len(starts) - 1
    maxima = products.new_full(shape, -torch.inf)
    indices = torch.full(shape, -1, dtype=torch.int32, device=rows.device)
    bounds = starts.clamp(0, len(columns)).cummax(0).values.tolist()
    for segment, (first, last) in enumerate(itertools.pairwise(bounds)):
        if first >= last:
            continue
        own = products[:, first:last]
        largest = own.amax(1, keepdim=True)
        is_largest = (own == largest) | own.isnan()
        maxima[:, segment] = largest[:, 0]
        indices[:, segment] = torch.where(is_largest, places[first:last], len(columns)).amin(1)
    return maxima, indices


def gather(weights: Tensor, columns: Tensor, indices: Tensor) -> Tensor:
    """(R, D), in the dtype of the weights."""
    out = weights.new_zeros(len(weights), columns.shape[1])
    for own, index in zip(weights.unbind(1), indices.unbind(1), strict=True):
        known = (index >= 0) & (index < len(columns))
        picked = columns[torch.where(known, index, 0)].to(weights.dtype) if len(columns) else out
        out = out + torch.where(known[:, None], own[:, None] * picked, 0)
    return out


def scatter(weights: Tensor, rows: Tensor, indices: Tensor, count: int) -> Tensor:
    """(count, D), in the dtype of the weights; indices outside of [0, count) are left out."""
    out = weights.new_zeros(count, rows.shape[1])
    if not count:
        return out
    rows = rows.to(weights.dtype)
    for own, index in zip(weights.unbind(1), indices.unbind(1), strict=True):
        known = (index >= 0) & (index < count)
        weighted = torch.where(known[:, None], own[:, None] * rows, 0)
        _add_in_order(out, torch.where(known, index, 0).long(), weighted)
    return out


def _add_in_order(out: Tensor, places: Tensor, rows: Tensor) -> None:
    """out[places] += rows, one after the other: index_add_ on a GPU takes any order."""
    if out.device.type == "cpu":
        out.index_add_(0, places, rows)
        return
    out.index_put_((places,), rows, accumulate=True)  # sorts, and is steady
