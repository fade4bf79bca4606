"""Span attention by the compiled core: addresses, sizes and strides out, nothing copied."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _core
from ...spans import Documents
from .._core_tensors import heads_of, unserved

MAX_HEAD = 256


def unsupported(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[-1] > MAX_HEAD:
            return f"it serves heads of up to {MAX_HEAD} numbers, those of {name} have {x.shape[-1]}"
    return unserved("q", q)


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    hulls: Tensor | None,
    documents: Documents | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = q.new_empty((batch, tokens, heads, v.shape[3]))
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    lo, hi = lo.contiguous(), hi.contiguous()
    _core.span_attention(
        heads_of(q), heads_of(k), heads_of(v), heads_of(out), lse.data_ptr(), _spans(lo, hi, batch), scale, softcap
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
    lo: Tensor,
    hi: Tensor,
    hulls: Tensor | None,
    documents: Documents | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    lo, hi = lo.contiguous(), hi.contiguous()
    _core.span_attention_backward(
        *map(heads_of, (d_out, q, k, v, out)),
        lse.data_ptr(),
        0 if d_lse is None else d_lse.data_ptr(),
        _spans(lo, hi, q.shape[0]),
        scale,
        softcap,
        *map(heads_of, grads),
    )
    return grads


def _spans(lo: Tensor, hi: Tensor, batch: int) -> _core.Spans:
    """Contiguous (B or 1, runs, Tq)."""
    _, runs, queries = lo.shape
    shared = lo.shape[0] == 1 and batch != 1
    return _core.Spans(lo.data_ptr(), hi.data_ptr(), runs, queries, 0 if shared else runs * queries)
