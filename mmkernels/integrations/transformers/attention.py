"""The attention call of transformers' models, by span_attention."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import output_capturing

from ... import backends
from ...spans import RowSpans
from .. import _attend, watch
from .._attend import NotSpans
from .._tracing import is_traced
from ..report import count_fallback
from ..swap import plain_class
from .documents import bounds
from .known import eager_function, supports_sdpa
from .layer_source import keywords
from .span_mask import SpanMask, is_dense, spans_of

NAME = "mmkernels"

# Keywords that say what is computed, and that spans express.
_SERVED = {"attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "dropout", "is_causal", "s_aux", "scaling", "softcap"}
# Those that say nothing of it: what other parts of the model return, or what the mask says already.
_HARMLESS = {
    "cache_position",
    "deterministic",  # of flash-attn's backward; ours is
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "seq_idx",
    "sliding_window",
    "use_cache",
}
# Hooks on attention layers that read no weights, or are asked for separately: transformers' recorders, and compare's.
_WITHOUT_WEIGHTS = {output_capturing.__name__, watch.__name__}
# Those that an attention function of transformers may take, and that go its way.
_OWN_WAY = {"cache", "output_attentions", "position_bias"}


def span_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """For AttentionInterface, with the arguments of its functions: query (B, Hq, Lq, D), key, value (B, Hkv, Lk, D) ->
    (B, Lq, Hq, D). What spans do not express goes the model's own way: dropout, weights that are asked for, biases.

    Raises ValueError for a keyword that it does not know: it may be what decides which keys are seen."""
    options = {name: value for name, value in options.items() if value is not None}
    unknown = _unknown(module, options)
    if unknown:
        raise ValueError(
            f'attn_implementation="{NAME}" does not know {", ".join(sorted(unknown))}, which {type(module).__name__} '
            'hands to its attention. Load the model with "sdpa" or "eager" and call mmkernels.accelerate(model), which '
            "leaves to the model what it does not know"
        )
    by_masks_alone = hasattr(module, "config") and not supports_sdpa(type(module.config))
    window = options.get("sliding_window")
    attention_mask = _of_documents(module, attention_mask, options.get("cu_seq_lens_q"))
    call = _Call(module, query, key, attention_mask, options, window=window, reads_is_causal=not by_masks_alone)
    try:
        if is_traced():
            raise NotSpans("a trace, or a transform of torch.func")
        for name in _OWN_WAY & options.keys():
            if name != "output_attentions" or options[name]:
                raise NotSpans(name)
        return call.by_spans(query, key, value), None
    except NotSpans as reason:
        count_fallback(module, str(reason))
    eager = eager_function(module)
    adds = call.mask is not None and call.mask.is_floating_point()
    if eager is not None and (
        adds or by_masks_alone or options.get("output_attentions") or {"softcap", "s_aux"} & options.keys()
    ):
        options.setdefault("scaling", None)
        mask = call.dense_mask() if call.causal or call.cu_seqlens is not None else call.own_mask()
        return eager(module, query, key, value, _additive(mask, query.dtype), **options)
    options.pop("output_attentions", None)
    return call.own_way(sdpa_attention_forward, query, key, value, options | {"is_causal": call.causal})


def _of_documents(module: nn.Module, mask: Tensor | None, offsets: Tensor | None) -> Tensor | None:
    """Of a model by name, which tells no mask where documents begin. Raises ValueError where that cannot be mended."""
    if offsets is None:
        return mask
    if isinstance(mask, SpanMask) and mask.of_documents is not None and not is_dense(mask):
        anew = mask.of_documents
        return _attend.kept(offsets, ("of documents", id(mask)), lambda: (anew(offsets), mask))[0]
    chunked = getattr(getattr(module, "config", None), "attention_chunk_size", None) is not None
    made_elsewhere = mask is not None and chunked  # as by compiled code; the chunks may count from the row's start
    if type(module).__name__ == "MllamaTextCrossAttention" or made_elsewhere:
        raise ValueError(
            f'attn_implementation="{NAME}" by itself cannot keep the documents of a pack apart in '
            f"{type(module).__name__}{', compiled' if made_elsewhere else ''}: call mmkernels.accelerate(model)"
        )
    return mask


def _unknown(module: nn.Module, options: dict) -> set[str]:
    """Keywords of a call that may decide the result: what the layer itself hands to its attention. What it only hands
    on from its caller means nothing to sdpa or eager code either."""
    unknown = options.keys() - _SERVED - _HARMLESS - _OWN_WAY
    named = keywords(plain_class(module)) if unknown else None
    return unknown if named is None else unknown & named


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


# ---- in an accelerated model


class Interface:
    """In the place of a model's ALL_ATTENTION_FUNCTIONS: each function it gives attends by spans, and hands to the one
    that the model would have got what spans do not express."""

    def __init__(self, plain: AttentionInterface):
        self.plain = plain

    def get_interface(self, name: str | None, default: Callable) -> Callable:
        return _over(name, self.plain.get_interface(name, default))

    def __getitem__(self, name: str) -> Callable:
        return _over(name, self.plain[name])

    def __getattr__(self, name: str):
        return getattr(self.plain, name)

    def __contains__(self, name: str) -> bool:
        return name in self.plain


def takes_the_place_of(name: str | None) -> bool:
    """Whether spans serve where a config has this name: not in the place of a user's own attention, or a paged one."""
    if name in (None, "eager", "sdpa", NAME):
        return True
    return ("flash" in name or "flex" in name) and not name.startswith("paged|")


def _over(name: str | None, plain: Callable) -> Callable:
    return functools.partial(_in_place_of, name, plain) if takes_the_place_of(name) else plain


def _in_place_of(
    name: str | None,
    plain: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """plain: the function that the model would call; name: its name in the model's config."""
    eager = name in (None, "eager")
    plain = sdpa_attention_forward if name == NAME else plain
    if not isinstance(query, Tensor) or is_traced():
        return plain(module, query, key, value, attention_mask, **options)
    call = _Call(module, query, key, attention_mask, options, reads_is_causal=not eager)
    call.has_sinks &= plain is not sdpa_attention_forward  # which does without them
    try:
        _refuse(plain, eager, module, options)
        return call.by_spans(query, key, value), None
    except NotSpans as reason:
        count_fallback(module, str(reason))
    if not eager and isinstance(attention_mask, SpanMask):
        plain = sdpa_attention_forward  # flash-attn and flex take masks of other forms
    return call.own_way(plain, query, key, value, options)


def _refuse(plain: Callable, eager: bool, module: nn.Module, options: dict) -> None:
    if eager and _wants_weights(module, options):
        raise NotSpans("attention weights are asked for")
    if options.get("output_attentions"):
        raise NotSpans("output_attentions")
    for name in _parameters(plain) & options.keys():
        if options[name] is not None:
            raise NotSpans(f"{name} is given")


@torch.compiler.assume_constant_result
def _parameters(plain: Callable) -> frozenset[str]:
    """What a model's attention function takes that spans do not express. What else a model hands to it, it ignores."""
    return _parameters_of(plain)


@functools.cache  # inside, as in known.py
def _parameters_of(plain: Callable) -> frozenset[str]:
    harmless = _HARMLESS - {"sliding_window"} if _is_eager(plain) else _HARMLESS  # which for others the mask says
    return frozenset(inspect.signature(plain).parameters) - _SERVED - harmless


def _wants_weights(module: nn.Module, options: dict) -> bool:
    """Whether someone will read the weights that eager attention returns: transformers' recorders, or a hook."""
    if options.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    active = output_capturing._active_collector
    recorded = active.global_var if torch.compiler.is_compiling() else active.get()
    if recorded and any("attentions" in name for name in recorded):
        return True
    return any(hook.__module__ not in _WITHOUT_WEIGHTS for hook in module._forward_hooks.values())


# ---- a call


class _Call:
    """Which keys the queries of a call see.

    window: that of a causal call without a mask. reads_is_causal: whether without a mask the call is causal by its
    keyword, else by its module, as sdpa has it; eager functions are causal by masks alone.
    """

    def __init__(self, module, query, key, mask, options, *, window=None, reads_is_causal=True):
        self.module, self.options, self.window = module, options, window
        self.batch, _, self.queries, _ = query.shape
        self.keys, self.device = key.shape[2], query.device
        self.mask = mask.dense() if isinstance(mask, SpanMask) and is_dense(mask) else mask
        # Of the text's tokens: attention to other keys gets them too.
        self.cu_seqlens = options.get("cu_seq_lens_q") if self.queries == self.keys else None
        is_causal = options.get("is_causal")
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        self.has_sinks = options.get("s_aux") is not None
        self.causal = reads_is_causal and mask is None and self.queries > 1 and bool(is_causal)

    def by_spans(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.options.get("dropout"):
            raise NotSpans("dropout on the attention weights")
        order, spans = self._order_and_spans()
        if order is not None:
            key, value = _attend.in_order(order, key, value)
        options = {"scale": self.options.get("scaling"), "softcap": self.options.get("softcap")}
        if self.has_sinks:
            options["sinks"] = self._sinks(query)
        return _attend.attend(query, key, value, spans, **options, backend=backends.of_module(self.module))

    def _sinks(self, query: Tensor) -> Tensor:
        """A logit a head beside the keys."""
        sinks = self.options["s_aux"]
        if tuple(sinks.shape) != (query.shape[1],):
            raise NotSpans(f"sinks of shape {tuple(sinks.shape)}")
        return sinks

    def own_way(self, plain: Callable, query, key, value, options: dict) -> tuple[Tensor, Tensor | None]:
        mask = self.own_mask()
        if self.cu_seqlens is not None:  # which no code of the model's own reads
            mask = self.dense_mask()
            mask = _additive(mask, query.dtype) if _is_eager(plain) else mask
            options = options | {"is_causal": False}
        return plain(self.module, query, key, value, mask, **options)

    def own_mask(self) -> Tensor | None:
        """The mask that the model made."""
        if not isinstance(self.mask, SpanMask):
            return self.mask
        mask = self.mask if self.mask.shape[2] == self.queries else self.mask[:, :, : self.queries]
        return mask if torch.compiler.is_compiling() or mask.refusal is None else mask.dense()

    def dense_mask(self) -> Tensor:
        """(B, 1, Q, K): what the mask says, or is_causal, within the segments."""
        if self.mask is None or isinstance(self.mask, SpanMask):
            return self._spans().to_dense()[:, None]
        everything = _attend.full(self.queries, self.keys, self.device)
        seen = _within_segments(everything, self.cu_seqlens, self.batch).to_dense()[:, None]
        mask = self._foreign_mask()
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    def _order_and_spans(self) -> tuple[Tensor | None, RowSpans]:
        """Spans, of the keys in another order if that is not None."""
        seen = self._seen_keys()
        if seen is not None and (self.cu_seqlens is None or torch.compiler.is_compiling()) and self._scattered(seen):
            order, rank = _attend.seen_first(seen)
            spans = self._without_seen()
            if self.cu_seqlens is not None:
                spans = _within_segments(spans, self.cu_seqlens, self.batch)
            lo, hi = (x if x.dim() == 3 else x[:, None] for x in (spans.lo, spans.hi))
            lo, hi = (rank.gather(1, x.flatten(1).long()).view(x.shape).int() for x in (lo, hi))
            return order, RowSpans(lo, hi, self.keys)
        return None, self._spans()

    def _seen_keys(self) -> Tensor | None:
        """(B, K) bool: the keys that may be seen, of a mask that is one of keys beside its spans."""
        mask = self.mask
        if isinstance(mask, SpanMask):
            return mask.seen
        if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
            return None
        if mask.shape[2] == 1 or mask.stride(2) == 0:
            return mask[:, 0, 0, : self.keys].expand(self.batch, self.keys)
        return None

    def _scattered(self, seen: Tensor) -> bool:
        """Whether they are in many runs; taken for granted under torch.compile, which cannot wait for the device."""
        if torch.compiler.is_compiling():
            if self.queries == 1:
                raise NotSpans("one query, and padding, under torch.compile")  # the copy of all keys costs more
            return True

        def scattered() -> bool:
            return _attend.runs_of_keys(seen) > _attend.MOST_KEY_RUNS

        if isinstance(self.mask, SpanMask):
            return self.mask.once("scattered", scattered)
        return _attend.kept(self.mask, "scattered", scattered)

    def _without_seen(self) -> RowSpans:
        if isinstance(self.mask, SpanMask) and self.mask.code is not None:
            return self._of_every_query(spans_of(self.mask, self.queries))
        lo = torch.zeros(self.batch, 1, self.queries, dtype=torch.int32, device=self.device)
        return RowSpans(lo, lo + self.keys, self.keys)

    def _spans(self) -> RowSpans:
        if self.cu_seqlens is None:
            return self._spans_of_mask()
        if self.mask is None or isinstance(self.mask, SpanMask):
            use = (id(self.mask), self.queries, self.causal, self.window, self.batch)
            return _attend.kept(self.cu_seqlens, use, self._spans_in_segments)[0]
        return self._spans_in_segments()[0]

    def _spans_in_segments(self) -> tuple[RowSpans, object]:
        """With the mask, so that while they are kept its id stays its own."""
        return _within_segments(self._spans_of_mask(), self.cu_seqlens, self.batch), self.mask

    def _spans_of_mask(self) -> RowSpans:
        if self.mask is None:
            window = self.window if self.causal or self.queries == 1 else None
            return _attend.full(self.queries, self.keys, self.device, causal=self.causal, window=window)
        if not isinstance(self.mask, SpanMask):
            mask = self._foreign_mask()
            return _attend.kept(self.mask, ("spans", *mask.shape), lambda: _attend.spans_of(mask))
        if self.mask.shape[3] != self.keys:
            raise NotSpans(f"a mask of {self.mask.shape[3]} keys for {self.keys}")
        if self.mask.seen is None:  # the Q-Former of BLIP-2 makes a mask of more rows than its cross-attention has
            return self._of_every_query(spans_of(self.mask, self.queries))
        mask = self.own_mask()
        dense = mask.dense() if isinstance(mask, SpanMask) else mask
        return self._of_every_query(_attend.spans_of(dense if dense.dtype == torch.bool else dense == 0))

    def _of_every_query(self, spans: RowSpans) -> RowSpans:
        """BridgeTower makes a mask of one row, which every query sees, as sdpa and eager functions broadcast it."""
        if spans.num_queries == self.queries:
            return spans
        if spans.num_queries != 1:
            raise NotSpans(f"a mask of {spans.num_queries} rows for {self.queries} queries")
        lo, hi = (x.expand(*x.shape[:-1], self.queries) for x in (spans.lo, spans.hi))
        return RowSpans(lo, hi, spans.num_keys)

    def _foreign_mask(self) -> Tensor:
        """(B or 1, H or 1, Q, K), as sdpa and eager functions broadcast it."""
        mask = self.mask
        if mask.dim() != 4:
            raise NotSpans(f"a mask of {mask.dim()} axes")
        mask = mask[..., : self.queries, : self.keys]
        try:
            return mask.expand(-1, -1, self.queries, self.keys)
        except RuntimeError:
            raise NotSpans(
                f"a mask of shape {tuple(mask.shape)} for {self.queries} queries, {self.keys} keys"
            ) from None


def _is_eager(function: Callable) -> bool:
    """Whether it is the eager function of a modeling file, which adds its mask to the scores."""
    return "eager" in function.__name__


def _within_segments(spans: RowSpans, cu_seqlens: Tensor, batch: int) -> RowSpans:
    """What lies in the segment of a query, where segments cut the batch's tokens laid one row after the other."""
    length = spans.num_queries
    lo, hi = (x.expand(batch, -1, -1) if x.dim() == 3 else x.expand(batch, 1, -1) for x in (spans.lo, spans.hi))
    start, end = bounds(cu_seqlens.to(device=lo.device, dtype=torch.int32), batch, length)
    return RowSpans(torch.maximum(lo, start[:, None]), torch.minimum(hi, end[:, None]), spans.num_keys)
