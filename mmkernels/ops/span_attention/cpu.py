"""Span attention by the compiled core: addresses, sizes and strides out, nothing copied."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _core
from .._address import address
from .._core_tensors import heads_of, unsupported_tensor
from .limits import too_wide
from .params import Params

MAX_HEAD = 576


def unsupported(q: Tensor, k: Tensor, v: Tensor, params: Params | None = None) -> str | None:
    return too_wide(q, k, v, MAX_HEAD) or unsupported_tensor("q", q)


def span_attention(q: Tensor, k: Tensor, v: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = q.new_empty((batch, tokens, heads, v.shape[3]))
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    _core.span_attention(
        q=heads_of(q),
        k=heads_of(k),
        v=heads_of(v),
        out=heads_of(out),
        lse=lse.data_ptr(),
        spans=_spans(params, batch),
        scale=params.scale,
        softcap=params.softcap,
    )
    return out, lse


def span_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None,
    params: Params,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _core.span_attention_backward(
        d_out=heads_of(d_out),
        q=heads_of(q),
        k=heads_of(k),
        v=heads_of(v),
        out=heads_of(out),
        lse=lse.data_ptr(),
        d_lse=address(d_lse),
        spans=_spans(params, q.shape[0]),
        scale=params.scale,
        softcap=params.softcap,
        d_q=heads_of(d_q),
        d_k=heads_of(d_k),
        d_v=heads_of(d_v),
    )
    return d_q, d_k, d_v


def _spans(params: Params, batch: int) -> _core.Spans:
    rows, runs, queries = params.lo.shape
    shared = rows == 1 and batch != 1
    return _core.Spans(params.lo.data_ptr(), params.hi.data_ptr(), runs, queries, 0 if shared else runs * queries)
