"""Attention as models call it, (B, H, L, D) with masks of their own, by span_attention on (B, L, H, D) with spans."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

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
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """q: (B, Hq, Lq, D), k, v: (B, Hkv, Lk, D), any strides -> (B, Lq, Hq, Dv), contiguous. sinks: (Hq,).

    Raises NotSpans where only the reference would serve the call and it was not asked for: the model's own code is
    faster than that; and for shapes that sdpa broadcasts.
    """
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise NotSpans("queries, keys and values that do not go together head by head")
    q, k, v = (_last_stride_one(x.transpose(1, 2)) for x in (q, k, v))
    if backend is None and not has_kernel("span_attention", q, k, v):
        raise NotSpans(f"no kernel serves heads of {max(q.shape[-1], v.shape[-1])} numbers in {q.dtype} on {q.device}")
    return span_attention(q, k, v, spans, scale=scale, softcap=softcap, sinks=sinks, backend=backend)


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


class _Kept(threading.local):
    def __init__(self):
        self.entries: dict[int, tuple[weakref.ref, Tensor, dict]] = {}  # tensor, its values then, what was made of it


_kept = _Kept()


def kept(tensor: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
    """What make() gives of a tensor, once for as long as the tensor lives and its values are what they were: spans are
    made once a mask, not once a layer.

    The values are compared. Nothing cheaper is proof: a tensor's version does not count what is written to it under
    inference_mode, through `.data`, by other processes or by kernels. Nothing is left on the tensor.
    """
    if torch.compiler.is_compiling():
        return make()
    entries, at, values = _kept.entries, id(tensor), _distinct(tensor)
    entry = entries.get(at)
    if entry is None or entry[0]() is not tensor or not torch.equal(entry[1], values):
        reference = weakref.ref(tensor, lambda _: entries.pop(at, None))
        entry = entries[at] = (reference, values.clone(), {})
    made = entry[2]
    if key not in made:
        made[key] = make()
    return made[key]


def _distinct(tensor: Tensor) -> Tensor:
    """Without the repetitions of axes that were only expanded."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


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


def runs_of_keys(seen: Tensor) -> int:
    """(B, K) bool -> the most runs of keys in a row. Waits for the device."""
    return 1 + (int((seen[:, 1:] & ~seen[:, :-1]).sum(-1).max()) if seen.shape[1] > 1 and len(seen) else 0)


def seen_first(seen: Tensor) -> tuple[Tensor, Tensor]:
    """seen: (B, K) bool, the keys that any query may see. -> an order of the keys, (B, K), in which these come first,
    and how many of them stand before each place of the old order, (B, K + 1).

    Attention does not mind the order of its keys: in this one, what was a run of keys with holes is a run without, from
    rank[lo] to rank[hi]. It costs a copy of keys and values, and no wait.
    """
    order = (~seen).to(torch.int8).sort(dim=-1, stable=True).indices
    return order, torch.nn.functional.pad(seen.cumsum(-1), (1, 0))


def in_order(order: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, H, K, D) tensors with their keys in the order of `seen_first`; copies: what was given stays as it is."""
    row = torch.arange(len(order), device=order.device)[:, None]
    return tuple(x.transpose(1, 2)[row, order].transpose(1, 2) for x in tensors)
