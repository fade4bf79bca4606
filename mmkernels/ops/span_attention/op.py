"""Registration of span attention: schemas, shapes for tracing, and autograd. Imports torch only.

Inside, every tensor has a batch axis and spans are (B or 1, runs, Tq). Spans are tensors like any other, so that a new
layout neither recompiles nor waits for the device. Documents, for the one backend that wants them, are the four fields
of `mmkernels.spans.Documents`, the first of them None where there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ...spans import Documents
from .._registration import differentiable_once, register

_SPANS = (
    "Tensor lo, Tensor hi, Tensor? hulls, Tensor? cu_seqlens, Tensor? cu_seqlens_k, bool causal, SymInt? window, "
    "float scale, float softcap, str backend"
)


def _forward(q, k, v, lo, hi, hulls, cu_seqlens, cu_seqlens_k, causal, window, scale, softcap, backend):
    documents = None if cu_seqlens is None else Documents(cu_seqlens, cu_seqlens_k, causal, window)
    kernels = backends.select("span_attention", backend, q, k, v, documents, scale, softcap)
    return kernels.span_attention(q, k, v, lo, hi, hulls, documents, scale, softcap)


def _forward_fake(q, k, v, lo, hi, hulls, cu_seqlens, cu_seqlens_k, causal, window, scale, softcap, backend):
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty((batch, heads, tokens), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((batch, tokens, heads, v.shape[3])), lse


def _backward(
    d_out, q, k, v, out, lse, lo, hi, hulls, cu_seqlens, cu_seqlens_k, causal, window, scale, softcap, backend
):
    documents = None if cu_seqlens is None else Documents(cu_seqlens, cu_seqlens_k, causal, window)
    kernels = backends.select("span_attention", backend, q, k, v, documents, scale, softcap)
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    return kernels.span_attention_backward(d_out, q, k, v, out, lse, lo, hi, hulls, documents, scale, softcap)


def _backward_fake(d_out, q, k, v, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


_forward_op = register(
    f"span_attention(Tensor q, Tensor k, Tensor v, {_SPANS}) -> (Tensor, Tensor)", _forward, _forward_fake
)
_backward_op = register(
    "span_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SPANS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lo, hi, hulls, cu_seqlens, cu_seqlens_k, *call):
        out, lse = _forward_op(q, k, v, lo, hi, hulls, cu_seqlens, cu_seqlens_k, *call)
        ctx.save_for_backward(q, k, v, out, lse, lo, hi, hulls, cu_seqlens, cu_seqlens_k)
        ctx.call = call
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx, d_out, _):
        return *_backward_op(d_out, *ctx.saved_tensors, *ctx.call), *[None] * (5 + len(ctx.call))


def span_attention(
    q, k, v, lo, hi, hulls, documents: Documents | None, scale, softcap, backend
) -> tuple[Tensor, Tensor]:
    arguments = (q, k, v, lo, hi, hulls, *(documents or (None, None, False, None)), scale, softcap, backend)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _SpanAttention.apply(*arguments)
    return _forward_op(*arguments)
