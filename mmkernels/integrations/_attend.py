"""Attention as models call it, (B, H, L, D) with masks of their own, by span_attention on (B, L, H, D) with spans."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..ops.span_attention import span_attention
from ..spans import RowSpans

MOST_RUNS = 16  # a mask with more runs a query is no matter of spans
MOST_KEY_RUNS = 4  # where all queries see the same keys: with more runs, it is cheaper to bring those keys together


class NotSpans(Exception):
    """A mask that spans do not express, or a call that span attention does not serve; the message says why."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: RowSpans,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """q: (B, Hq, Lq, D), k, v: (B, Hkv, Lk, D), any strides -> (B, Lq, Hq, Dv), contiguous.

    Raises NotSpans where only the reference would serve the call and it was not asked for: the model's own code is
    faster than that.
    """
    q, k, v = (_last_stride_one(x.transpose(1, 2)) for x in (q, k, v))
    if backend is None and not has_kernel("span_attention", q, k, v):
        raise NotSpans(f"no kernel serves heads of {max(q.shape[-1], v.shape[-1])} numbers in {q.dtype} on {q.device}")
    return span_attention(q, k, v, spans, scale=scale, softcap=softcap, backend=backend)


def has_kernel(op: str, *tensors: Tensor) -> bool:
    """As backends', which cannot be asked under torch.compile: there the op itself finds out."""
    return torch.compiler.is_compiling() or backends.has_kernel(op, *tensors)


def _last_stride_one(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def full(queries: int, keys: int, device: torch.device, *, causal: bool = False, window: int | None = None) -> RowSpans:
    """Causal as scaled_dot_product_attention's is_causal: query i stands at key i."""
    if not causal and window is None:
        return RowSpans.full(queries, keys, device=device)
    i = torch.arange(queries, dtype=torch.int32, device=device)
    hi = i + 1 if causal else torch.full_like(i, keys)
    lo = torch.zeros_like(i) if window is None else (hi - window).clamp(min=0)
    return RowSpans(lo, hi, keys)


# ---- masks that a model made itself


def kept(mask: Tensor | None, key: tuple, make):
    """What make() gives, once for this very tensor, as long as it is not written to: spans are made once a mask, not
    once a layer. They are kept on the tensor, and lost with any view of it: then they are only made again."""
    if mask is None or torch.compiler.is_compiling():
        return make()
    version = None if mask.is_inference() else mask._version
    held = getattr(mask, "_mmkernels_spans", None)
    if held is None or held[0] != version:
        held = mask._mmkernels_spans = (version, {})
    if key not in held[1]:
        held[1][key] = make()
    return held[1][key]


def spans_of(mask: Tensor) -> RowSpans:
    """(B or 1, H, Q, K), bool (True: seen) or additive (0 or very negative). Waits for the device. Raises NotSpans."""
    if torch.compiler.is_compiling():
        raise NotSpans("a dense mask under torch.compile")
    if mask.shape[1] > 1 and mask.stride(1) != 0 and not bool((mask == mask[:, :1]).all()):
        raise NotSpans("a mask that differs between heads")
    mask = mask[:, 0]
    queries = mask.shape[1]
    for axis in (0, 1):  # what was only expanded is looked at once
        if mask.stride(axis) == 0 and mask.shape[axis] > 1:
            mask = mask.narrow(axis, 0, 1)
    try:
        spans = RowSpans.from_dense(_seen(mask), max_runs=MOST_RUNS)
    except ValueError as error:
        raise NotSpans(str(error)) from None
    lo, hi = (x.expand(-1, -1, queries) for x in (spans.lo, spans.hi))
    return RowSpans(lo, hi, spans.num_keys) if len(lo) > 1 else RowSpans(lo[0], hi[0], spans.num_keys)


def _seen(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    seen = mask > torch.finfo(mask.dtype).min / 2
    if bool((seen & (mask != 0)).any()):
        raise NotSpans("a mask that adds values other than 0 and very negative ones")
    return seen


def keys_first(mask: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mask: (B, K) bool, the keys that all queries see. k and v with these first, and how many they are, (B,).

    Attention does not mind the order of its keys, so what was many runs becomes one. Two copies, no wait.
    """
    order = (~mask).to(torch.int8).sort(dim=-1, stable=True).indices
    row = torch.arange(len(k), device=k.device)[:, None]
    k, v = (x.transpose(1, 2)[row, order].transpose(1, 2) for x in (k, v))
    return k, v, mask.sum(-1, dtype=torch.int32)
