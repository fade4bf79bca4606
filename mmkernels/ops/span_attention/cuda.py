"""Span attention by the CUDA kernels: addresses, sizes and strides out, nothing copied."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cuda
from ...spans import Documents, RowSpans
from .._cuda_tensors import has_hopper_kernels, launch, unserved

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
    batch, queries, heads, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[3]))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    lo, hi, hulls = _spans(lo, hi, hulls, k.shape[1])
    call = _call(q, k, v, out, lo, hi, hulls, lse, scale, softcap)
    hopper = has_hopper_kernels(q.device) and _cuda.span_attention_forward_sm90_serves(call)
    launcher = _cuda.span_attention_forward_sm90 if hopper else _cuda.span_attention_forward
    launch(launcher, call, q=q, k=k, v=v, lo=lo, hi=hi, hulls=hulls)
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
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    lo, hi, hulls = _spans(lo, hi, hulls, k.shape[1])
    lse = lse.contiguous()
    forward = _call(q, k, v, out, lo, hi, hulls, lse, scale, softcap)
    workspace = q.new_empty(_cuda.span_attention_backward_bytes(forward), dtype=torch.uint8)
    call = _cuda.SpanAttentionBackward(
        forward=forward,
        d_out=_heads(d_out),
        d_q=_heads(d_q),
        d_k=_heads(d_k),
        d_v=_heads(d_v),
        d_lse=0 if d_lse is None else d_lse.data_ptr(),
        workspace=workspace.data_ptr(),
    )
    hopper = has_hopper_kernels(q.device) and _cuda.span_attention_backward_sm90_serves(call)
    launcher = _cuda.span_attention_backward_sm90 if hopper else _cuda.span_attention_backward
    fed = {} if d_lse is None else {"d_lse": d_lse}
    launch(launcher, call, d_out=d_out, **fed, q=q, k=k, v=v, out=out, lse=lse, lo=lo, hi=hi, hulls=hulls)
    return d_q, d_k, d_v


def _spans(lo: Tensor, hi: Tensor, hulls: Tensor | None, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    if hulls is None:
        hulls = RowSpans(lo, hi, keys).hulls()
    return lo.contiguous(), hi.contiguous(), hulls.contiguous()


def _call(q, k, v, out, lo, hi, hulls, lse, scale: float, softcap: float) -> _cuda.SpanAttention:
    return _cuda.SpanAttention(
        q=_heads(q),
        k=_heads(k),
        v=_heads(v),
        out=_heads(out),
        lo=lo.data_ptr(),
        hi=hi.data_ptr(),
        hulls=hulls.data_ptr(),
        lse=lse.data_ptr(),
        batch=q.shape[0],
        queries=q.shape[1],
        keys=k.shape[1],
        heads=q.shape[2],
        key_heads=k.shape[2],
        head_size=q.shape[3],
        value_size=v.shape[3],
        runs=lo.shape[1],
        spans_by_batch=lo.shape[0] != 1,
        bfloat16=q.dtype == torch.bfloat16,
        scale=scale,
        softcap=softcap,
    )


def _heads(x: Tensor) -> _cuda.Heads:
    """A (B, T, H, D) tensor with a unit last stride. It must outlive the call that this is passed to."""
    return _cuda.Heads(x.data_ptr(), *x.stride()[:3])
