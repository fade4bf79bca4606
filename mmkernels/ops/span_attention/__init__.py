"""Attention in which each query sees runs of keys: packed documents, images inside text, windows, cross-attention."""

from __future__ import annotations

import math

from torch import Tensor

from ... import backends
from ...spans import RowSpans
from .. import _checks
from . import op
from .sinks import with_sinks

_NAME = "span_attention"


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: RowSpans,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, in which query i sees the keys that `spans` gives it and no others.

    A query that sees no key gives zeros, an lse of -inf and no gradient, whatever the gradients of these hold. Keys and
    values outside every span, such as padding, may hold anything, NaN too, without reaching the result or a gradient;
    and what one document holds reaches no other, if no query sees keys of both. (Where queries have several runs and
    the keys of two documents interleave, a NaN in one may reach the other's gradients on the CPU, never its result. And
    flash-attn 3, where the backend "flash-attn" finds it, lets a document's NaN reach the one before it.)

    Args:
        q: queries (Tq, Hq, D), or with a batch axis (B, Tq, Hq, D); float32, bfloat16 or float16 (the reference
            backend: float64 too). Here and below the last stride must be 1, the others may be anything: slices of a
            fused projection, a (B, H, T, D) tensor transposed and a KV cache are read where they lie.
        k, v: keys (Tk, Hkv, D) and values (Tk, Hkv, Dv), or with the batch axis of q; Hq a multiple of Hkv, and query
            head h reads key head h // (Hq / Hkv) (grouped-query attention, Ainslie et al. 2023,
            https://arxiv.org/abs/2305.13245).
        spans: which keys each query sees; `mmkernels.RowSpans` and its builders. Spans without a batch axis serve every
            row of the batch; key numbers count within a row.
        scale: factor on q k^T; None: 1 / sqrt(D).
        softcap: if given, scores become softcap * tanh(scores / softcap) before the softmax, as in Gemma 2.
        sinks: (Hq,), floating: a logit for each query head that stands beside those of the keys, of a key that every
            query sees and whose value is zero, as in gpt-oss (OpenAI 2025, https://arxiv.org/abs/2508.10925), where it
            is learnt; what sinks are for, Xiao et al. 2023, https://arxiv.org/abs/2309.17453. It is neither scaled nor
            capped. With the lse of the keys alone, the result is that without sinks times sigmoid(lse - sink).
        return_lse: return also the log-sum-exp of every query's scores, natural logarithm, differentiable: parts of the
            keys can be merged by it, or a loss may hold it. With sinks, they count in it: log(exp(lse) + exp(sink)),
            and that of a query that sees no key is its sink. It is of autograd's graph: detach() one that is kept.
        backend: "cuda", "triton", "cpu", "reference"; None takes the fastest of them that supports the call. Or, by
            name only, "flash-attn": flash-attn's kernels, or torch's build of them, for spans of `RowSpans.packed` and
            `RowSpans.full`. Heads of more than 256 numbers are served up to 576, but not by "flash-attn", not by
            "triton" in float32 on a GPU, and not by "cuda" where blocks have 99 KiB of shared memory (sm_86, 89, 120).

    Returns:
        (Tq, Hq, Dv) of q's dtype, contiguous, with the batch axis of q if it has one; differentiable once in q, k, v
        and sinks (in forward mode by plain PyTorch, with all the weights in memory). Softmax and sums are computed in
        float32. With return_lse, also float32 (Hq, Tq), or (B, Hq, Tq).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype, shape, stride or device; the message names it.
        BackendUnavailable: the backend asked for cannot serve the call.
    """
    for label, value in (("q", q), ("k", k), ("v", v)):
        _checks.floating(_NAME, label, value)
    q, k, v = _checks.autocast(q, k, v)
    _check_heads(q, k, v)
    _check_spans(spans, q, k)
    if sinks is not None:
        _check_sinks(sinks, q)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{_NAME}: softcap is {softcap}; it must be positive, or None for none")
    softcap = None if softcap == math.inf else softcap  # the limit, which a kernel would take for 0 * inf
    batched = q.dim() == 4
    if not batched:
        q, k, v = q[None], k[None], v[None]
    lo, hi = spans.with_axes()
    asked, device = backends.requested(backend), q.device.type
    hulls = spans.hulls() if backends.considered(asked, device, "cuda", "triton") else None
    documents = spans.documents() if backends.considered(asked, device, "flash-attn") else None
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    want_lse = return_lse or sinks is not None
    out, lse = op.span_attention(q, k, v, lo, hi, hulls, documents, scale, float(softcap or 0.0), want_lse, asked)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks, return_lse)
    if not batched:
        out = out.squeeze(0)  # by an index, the gradient would be copied
        lse = lse.squeeze(0) if return_lse else None
    return (out, lse) if return_lse else out


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() not in (3, 4):
        raise ValueError(f"{_NAME}: q has shape {tuple(q.shape)}; it must be (Tq, Hq, D) or (B, Tq, Hq, D)")
    for label, value in (("k", k), ("v", v)):
        if value.dim() != q.dim():
            axes = "(Tk, Hkv, D)" if q.dim() == 3 else "(B, Tk, Hkv, D)"
            raise ValueError(
                f"{_NAME}: {label} has shape {tuple(value.shape)}, q {tuple(q.shape)}; {label} must be {axes} beside it"
            )
        _checks.same_dtype(_NAME, label, value, "q", q)
        _checks.same_device(_NAME, label, value, "q", q)
    for label, value in (("q", q), ("k", k), ("v", v)):
        heads, dim = value.shape[-2:]
        if heads == 0 or dim == 0:
            raise ValueError(
                f"{_NAME}: {label} has shape {tuple(value.shape)}; it needs at least one head of one number"
            )
        if dim > 1 and value.stride(-1) != 1:
            raise ValueError(
                f"{_NAME}: {label} has strides {value.stride()}; the last must be 1: call {label}.contiguous()"
            )
    (*q_batch, _, q_heads, q_dim), (*k_batch, _, k_heads, k_dim) = q.shape, k.shape
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{_NAME}: k has shape {tuple(k.shape)}, v {tuple(v.shape)}; they must be equal but for the last axis"
        )
    if q_batch != k_batch:
        raise ValueError(f"{_NAME}: q has a batch of {q_batch[0]}, k and v of {k_batch[0]}; they must be equal")
    if k_dim != q_dim:
        raise ValueError(f"{_NAME}: k has heads of {k_dim} numbers, q of {q_dim}; they must be equal")
    if q_heads % k_heads:
        raise ValueError(
            f"{_NAME}: k has {k_heads} heads, q has {q_heads}; the number of query heads must be a multiple of the key "
            "heads"
        )


def _check_spans(spans: RowSpans, q: Tensor, k: Tensor) -> None:
    if not isinstance(spans, RowSpans):
        raise TypeError(f"{_NAME}: spans must be a mmkernels.RowSpans, got {type(spans).__name__}")
    if spans.device != q.device:
        raise ValueError(f"{_NAME}: spans are on {spans.device}, q on {q.device}; move them with spans.to(...)")
    if spans.num_queries != q.shape[-3]:
        raise ValueError(f"{_NAME}: spans are for {spans.num_queries} queries, q has {q.shape[-3]}")
    if spans.num_keys != k.shape[-3]:
        raise ValueError(f"{_NAME}: spans are for {spans.num_keys} keys, k has {k.shape[-3]}")
    if spans.batch is not None and (q.dim() == 3 or spans.batch != q.shape[0]):
        batch = "none" if q.dim() == 3 else q.shape[0]
        raise ValueError(f"{_NAME}: spans have a batch of {spans.batch}, q has {batch}; they must be equal")


def _check_sinks(sinks: Tensor, q: Tensor) -> None:
    _checks.floating(_NAME, "sinks", sinks)
    _checks.same_device(_NAME, "sinks", sinks, "q", q)
    heads = q.shape[-2]
    if tuple(sinks.shape) != (heads,):
        raise ValueError(
            f"{_NAME}: sinks has shape {tuple(sinks.shape)}, q {heads} heads; sinks must be ({heads},), one for each"
        )
