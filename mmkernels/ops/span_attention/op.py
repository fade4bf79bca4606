"""Registration of span attention: schemas, shapes for tracing, and autograd. Imports torch only.

Inside, every tensor has a batch axis and spans are (B or 1, runs, Tq). Spans are tensors like any other, so that a new
layout neither recompiles nor waits for the device. Documents, for the one backend that wants them, are the four fields
of `mmkernels.spans.Documents`, the first of them None where there are none. Backends get all this as one `Params`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ...spans import Documents
from .._autograd import OnceDifferentiable, Op, folded, is_forward_mode
from .._registration import register
from . import reference
from .params import Params

_PARAMS = (
    "Tensor lo, Tensor hi, Tensor? hulls, Tensor? cu_seqlens, Tensor? cu_seqlens_k, bool causal, SymInt? window, "
    "float scale, float softcap, str backend"
)


def _params(lo, hi, hulls, cu_seqlens, cu_seqlens_k, causal, window, scale, softcap) -> Params:
    documents = None if cu_seqlens is None else Documents(cu_seqlens, cu_seqlens_k, causal, window)
    hulls = None if hulls is None else hulls.contiguous()
    return Params(lo.contiguous(), hi.contiguous(), hulls, documents, scale, softcap)


def _forward(q, k, v, *params):
    *params, backend = params
    call = q, k, v, _params(*params)
    return backends.select("span_attention", backend, *call).span_attention(*call)


def _forward_fake(q, k, v, *_):
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty((batch, heads, tokens), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((batch, tokens, heads, v.shape[3])), lse


def _backward(d_out, q, k, v, out, lse, d_lse, *params):
    *params, backend = params
    params = _params(*params)
    kernels = backends.select("span_attention", backend, q, k, v, params)
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    return kernels.span_attention_backward(d_out, q, k, v, out, lse, d_lse, params)


def _backward_fake(d_out, q, k, v, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


_forward_op = register(
    f"span_attention(Tensor q, Tensor k, Tensor v, {_PARAMS}) -> (Tensor, Tensor)", _forward, _forward_fake
)
_backward_op = register(
    "span_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? d_lse, "
    f"{_PARAMS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _SpanAttention(Op):
    @staticmethod
    def forward(*args):
        *args, _ = args  # want_lse
        return _forward_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        q, k, v, *spans = inputs[:8]
        out, lse = outputs
        ctx.save_for_backward(q, k, v, out, lse, *map(_savable, spans))
        *ctx.call, ctx.want_lse = inputs[8:]
        ctx.set_materialize_grads(False)  # an lse that nobody differentiates has none, and costs nothing
        if not ctx.want_lse:
            ctx.mark_non_differentiable(lse)
        if is_forward_mode():
            ctx.save_for_forward(q, k, v, *spans[:2])

    @staticmethod
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse, *spans = ctx.saved_tensors
        d_lse = d_lse if ctx.want_lse else None  # a compiled function makes zeros of it
        others = [None] * (len(spans) + len(ctx.call) + 1)
        if d_out is None and d_lse is None:
            return None, None, None, *others
        d_out = torch.zeros_like(out) if d_out is None else d_out
        inputs = d_out, q, k, v, out, lse, d_lse
        return *_Gradients.call(inputs, *inputs, *spans, *ctx.call), *others

    @staticmethod
    def jvp(ctx, *tangents):
        *tensors, lo, hi = ctx.saved_tensors
        params = _params(lo, hi, None, None, None, *ctx.call[:4])
        out, lse = reference.span_attention_jvp(*tensors, *tangents[:3], params)
        return out, lse if ctx.want_lse else None

    vmap = folded(forward, batched=3, shared=3)


class _Gradients(OnceDifferentiable):
    op = "span_attention"
    forward = staticmethod(_backward_op)
    vmap = folded(_backward_op, batched=7, shared=3)


def span_attention(
    q, k, v, lo, hi, hulls, documents: Documents | None, scale, softcap, want_lse, backend
) -> tuple[Tensor, Tensor]:
    """Without want_lse, the lse has no gradient."""
    cu_seqlens, cu_seqlens_k, causal, window = documents or (None, None, False, None)
    call = lo, hi, hulls, cu_seqlens, cu_seqlens_k, causal, window, scale, softcap, backend, want_lse
    return _SpanAttention.call((q, k, v), q, k, v, *call)


def _savable(x: Tensor | None) -> Tensor | None:
    """What spans hold may be of an evaluation in inference mode, whose tensors autograd does not save: then a copy."""
    return x.clone() if x is not None and not torch.compiler.is_compiling() and x.is_inference() else x
