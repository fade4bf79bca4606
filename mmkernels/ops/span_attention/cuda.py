"""Span attention by the CUDA kernels: addresses, sizes and strides out, nothing copied."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cuda
from .._address import address
from .._cuda_tensors import capability, launch, unsupported_tensor
from .limits import too_wide
from .params import Params

MAX_HEAD, MAX_HEAD_IN_99_KIB = 576, 256  # of shared memory a block; wider ones take up to 163


def unsupported(q: Tensor, k: Tensor, v: Tensor, params: Params | None = None) -> str | None:
    return unsupported_tensor("q", q) or too_wide(q, k, v, MAX_HEAD) or _too_wide_for_the_device(q, k, v)


def _too_wide_for_the_device(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    major, minor = capability(q.device)
    wide = too_wide(q, k, v, MAX_HEAD_IN_99_KIB) if major == 12 or (major, minor) in ((8, 6), (8, 9)) else None
    return wide and f"on sm_{major}{minor}, whose blocks have 99 KiB of shared memory, {wide}"


def span_attention(q: Tensor, k: Tensor, v: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[3]))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    params = params.with_hulls(k.shape[1])
    call = _call(q, k, v, out, lse, params)
    launch("span_attention_forward", call, q=q, k=k, v=v, **_spans(params))
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
    lse, params = lse.contiguous(), params.with_hulls(k.shape[1])
    forward = _call(q, k, v, out, lse, params)
    workspace = q.new_empty(_cuda.span_attention_backward_bytes(forward), dtype=torch.uint8)
    call = _cuda.SpanAttentionBackward(
        forward=forward,
        d_out=_heads(d_out),
        d_q=_heads(d_q),
        d_k=_heads(d_k),
        d_v=_heads(d_v),
        d_lse=address(d_lse),
        workspace=workspace.data_ptr(),
    )
    fed = {} if d_lse is None else {"d_lse": d_lse}
    launch("span_attention_backward", call, d_out=d_out, **fed, q=q, k=k, v=v, out=out, lse=lse, **_spans(params))
    return d_q, d_k, d_v


def _spans(params: Params) -> dict[str, Tensor]:
    return dict(lo=params.lo, hi=params.hi, hulls=params.hulls)


def _call(q, k, v, out, lse, params: Params) -> _cuda.SpanAttention:
    return _cuda.SpanAttention(
        q=_heads(q),
        k=_heads(k),
        v=_heads(v),
        out=_heads(out),
        lo=params.lo.data_ptr(),
        hi=params.hi.data_ptr(),
        hulls=params.hulls.data_ptr(),
        lse=lse.data_ptr(),
        batch=q.shape[0],
        queries=q.shape[1],
        keys=k.shape[1],
        heads=q.shape[2],
        key_heads=k.shape[2],
        head_size=q.shape[3],
        value_size=v.shape[3],
        runs=params.lo.shape[1],
        spans_by_batch=params.lo.shape[0] != 1,
        bfloat16=q.dtype == torch.bfloat16,
        scale=params.scale,
        softcap=params.softcap,
    )


def _heads(x: Tensor) -> _cuda.Heads:
    """A (B, T, H, D) tensor with a unit last stride. It must outlive the call that this is passed to."""
    return _cuda.Heads(x.data_ptr(), *x.stride()[:3])
