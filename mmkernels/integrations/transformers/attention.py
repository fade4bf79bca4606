"""The attention call of any transformers model, by span_attention."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ... import backends
from ...spans import RowSpans
from .. import _attend
from .._attend import NotSpans
from ..report import count_fallback
from .codes import decode, is_code


def span_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """For AttentionInterface, with the arguments of its functions: query (B, Hq, Lq, D), key, value (B, Hkv, Lk, D) ->
    (B, Lq, Hq, D). What spans do not express goes the model's own way: dropout, weights that are asked for, biases."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    cu_seqlens = cu_seq_lens_q if query.shape[2] == key.shape[2] else None  # they describe self-attention only
    call = _Call(query, key, attention_mask, cu_seqlens, is_causal, sliding_window)
    try:
        _refuse(dropout, kwargs)
        key, value, spans = call.keys_values_and_spans(key, value)
        out = _attend.attend(
            query, key, value, spans, scale=scaling, softcap=softcap, backend=backends.of_module(module)
        )
        return out, None
    except NotSpans as reason:
        count_fallback(module, str(reason))
    if cu_seqlens is not None:  # which only a packed call says, and no code of the model's own reads
        attention_mask, is_causal = call.dense_mask(), False
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "sliding_window": sliding_window}
    return own_path(module, query, key, value, attention_mask, softcap=softcap, **options, **kwargs)


def _refuse(dropout: float, kwargs: dict) -> None:
    if dropout:
        raise NotSpans("dropout on the attention weights")
    if kwargs.get("output_attentions"):
        raise NotSpans("output_attentions")
    for name in ("position_bias", "s_aux", "cache"):
        if kwargs.get(name) is not None:
            raise NotSpans(f"{name} is given")


class _Call:
    """Which keys the queries of a call see."""

    def __init__(self, query, key, mask, cu_seqlens, is_causal, window):
        self.batch, _, self.queries, _ = query.shape
        self.keys, self.device = key.shape[2], query.device
        self.mask, self.cu_seqlens, self.window = mask, cu_seqlens, window
        self.causal = bool(is_causal) and self.queries > 1  # as sdpa

    def keys_values_and_spans(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, RowSpans]:
        same = self._same_for_all_queries()
        if same is not None and self._scattered(same):
            key, value, count = _attend.keys_first(same, key, value)
            hi = count[:, None, None].expand(-1, 1, self.queries)
            return key, value, RowSpans(torch.zeros_like(hi), hi, self.keys)
        if torch.compiler.is_compiling():
            return key, value, self._spans()
        on = self.mask if self.mask is not None else self.cu_seqlens
        use = (self.queries, self.keys, self.causal, self.window, self.batch, id(self.cu_seqlens))
        spans, _ = _attend.kept(on, use, lambda: (self._spans(), self.cu_seqlens))  # held, so that its id stays its own
        return key, value, spans

    def dense_mask(self) -> Tensor:
        """(B, 1, Q, K), what spans say of these segments and whatever else the mask says."""
        if self.mask is None or is_code(self.mask):
            return self._spans().to_dense()[:, None]
        everything = _attend.full(self.queries, self.keys, self.device)
        seen = _within_segments(everything, self.cu_seqlens, self.batch).to_dense()[:, None]
        mask = self.mask[..., : self.queries, : self.keys]
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    def _same_for_all_queries(self) -> Tensor | None:
        """(B, K) bool, where this is a mask of keys only."""
        mask = self.mask
        if mask is None or is_code(mask) or mask.dtype != torch.bool or self.cu_seqlens is not None:
            return None
        if mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0):
            return mask[:, 0, 0, : self.keys]
        return None

    def _scattered(self, keys: Tensor) -> bool:
        """Whether they are in many runs; taken for granted under torch.compile, which cannot wait for the device."""
        if torch.compiler.is_compiling():
            return True
        return _attend.kept(self.mask, ("scattered",), lambda: _runs_of_keys(keys) > _attend.MOST_KEY_RUNS)

    def _spans(self) -> RowSpans:
        if self.mask is None:
            window = self.window if self.causal or self.queries == 1 else None
            spans = _attend.full(self.queries, self.keys, self.device, causal=self.causal, window=window)
        elif is_code(self.mask):
            spans = decode(self.mask, self.queries)  # the Q-Former of BLIP-2 cross-attends from the first rows only
        else:
            spans = _attend.spans_of(self.mask[..., : self.queries, : self.keys])
        return spans if self.cu_seqlens is None else _within_segments(spans, self.cu_seqlens, self.batch)


def _runs_of_keys(mask: Tensor) -> int:
    return 1 + (int((mask[:, 1:] & ~mask[:, :-1]).sum(-1).max()) if mask.shape[1] > 1 else 0)


def _within_segments(spans: RowSpans, cu_seqlens: Tensor, batch: int) -> RowSpans:
    """What lies in the segment of a query, where segments cut the batch's tokens laid one row after the other."""
    length = spans.num_queries
    lo, hi = (x.expand(batch, -1, -1) if x.dim() == 3 else x.expand(batch, 1, -1) for x in (spans.lo, spans.hi))
    token = torch.arange(batch * length, device=lo.device, dtype=torch.int32).view(batch, 1, length)
    cu_seqlens = cu_seqlens.to(device=lo.device, dtype=torch.int32)
    segment = torch.searchsorted(cu_seqlens[1:], token, right=True)
    bounds = torch.cat([cu_seqlens, cu_seqlens[-1:]])  # a token past the last segment sees nothing
    start, end = (bounds[segment + side] - token[..., :1] for side in (0, 1))
    return RowSpans(torch.maximum(lo, start), torch.minimum(hi, end), spans.num_keys)


# ---- the model's own way


def dense_mask(mask: Tensor | None, queries: int, keys: int, dtype: torch.dtype | None = None) -> Tensor | None:
    """A mask as sdpa takes it, or additive in `dtype` as eager code does."""
    if mask is None:
        return None
    mask = decode(mask).to_dense()[:, None, :queries] if is_code(mask) else mask[..., :queries, :]
    mask = mask[..., :keys]
    if dtype is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def own_path(module, query, key, value, mask, *, softcap, **options) -> tuple[Tensor, Tensor | None]:
    """What the model does without us: its eager function where weights, a softcap or sinks are wanted, else sdpa."""
    queries, keys = query.shape[2], key.shape[2]
    eager = _eager_function(module)
    if eager is not None and (options.get("output_attentions") or softcap or options.get("s_aux") is not None):
        if mask is None and options["is_causal"] and queries > 1:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
        options = {
            name: x for name, x in (options | {"softcap": softcap}).items() if x is not None or name == "scaling"
        }
        return eager(module, query, key, value, dense_mask(mask, queries, keys, query.dtype), **options)
    options.pop("output_attentions", None)
    return sdpa_attention_forward(module, query, key, value, dense_mask(mask, queries, keys), **options)


def _eager_function(module: nn.Module):
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    return None
