"""The masks of transformers as row spans, without the mask.

A model says which keys its queries see by a function of indices, put together from a few of `masking_utils` (causal,
bidirectional, sliding, chunked, blockwise, packed; and, or), and a 2-D mask of padding. Each of them gives a query runs
of keys, so that their unions and intersections are runs as well (runs.py): O(B Q) numbers, in place of B Q K. The
functions are closures, known by their module and name, their data read from their cells.

A function of other origin gives the dense mask that sdpa would be given; `attention.py` finds the runs in that.

Where the caller says where documents begin (documents.py), nothing is guessed: functions are asked with positions
counted from there, tables are looked up in the row, and what lies in other documents is cut off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, masking_utils

from ... import _layouts
from .._tracing import is_traced
from .attention import NAME, takes_the_place_of
from .documents import apart, begin_anew, bounds, told, warn_unsaid
from .known import supports_sdpa
from .runs import FAR, Runs, compact
from .span_mask import SpanMask, encode

# Of masks alone, in accelerated models: what they are where a model works on them.
SDPA_NAME, EAGER_NAME = "mmkernels for sdpa", "mmkernels for eager"


class NotRecognised(Exception):
    """A mask function that is not made of those of masking_utils."""


def span_mask(*, config: PreTrainedConfig | None = None, **arguments) -> Tensor | None:
    """For AttentionMaskInterface, with the arguments of its functions: a bool SpanMask, or None where every query sees
    every key. Where a model knows no bool masks, the mask refuses to be anything but spans; and one that is not spans
    is additive, which such a model's own code knows, and attention by this name as well."""
    refusal = _refusal(config)
    make = functools.partial(_mask, refusal, otherwise_additive=refusal is not None, **arguments)
    mask = make()
    if isinstance(mask, SpanMask) and not torch.compiler.is_compiling():
        mask.of_documents = lambda offsets: make(documents=offsets)
    return mask


def bool_span_mask(*, config: PreTrainedConfig | None = None, **arguments) -> Tensor | None:
    """The same in the place of a mask for sdpa."""
    return _mask(None, rule=_rule_of(config), **arguments)


def additive_span_mask(*, config: PreTrainedConfig | None = None, **arguments) -> Tensor | None:
    """The same in the place of a mask for eager attention."""
    return _mask(None, additive=True, otherwise_additive=True, rule=_rule_of(config), **arguments)


def with_spans(function: Callable) -> Callable:
    """One of the functions of masking_utils, making masks of spans for models that attend by another name."""

    @functools.wraps(function)
    def make(*args, **kwargs):
        config = kwargs["config"] if "config" in kwargs else args[0]
        rule = _rule(function, config, kwargs)
        if told() is not None and rule is None and torch.compiler.is_compiling() and not is_traced():
            return apart(make, *args, **kwargs)
        renamed = _renamed(config, rule)
        if "config" in kwargs:
            kwargs["config"] = renamed
        else:
            args = (renamed, *args[1:])
        if told() is not None and "position_ids" in kwargs:
            kwargs["position_ids"] = None  # from which documents would be guessed
        elif _is_changed(kwargs) and begin_anew(kwargs.get("position_ids")):
            warn_unsaid("tokens that see later ones")
        return function(*args, **kwargs)

    return make


def _renamed(config: PreTrainedConfig, rule: Rule | None) -> PreTrainedConfig | _Renamed:
    name = config._attn_implementation
    if not takes_the_place_of(name) or (name == NAME and not supports_sdpa(type(config))):
        return config
    return _Renamed(config, EAGER_NAME if name in (None, "eager") else SDPA_NAME, rule)


class Rule(NamedTuple):
    """What a causal mask is by the function that was asked for it, as far as that says all: torch.compile cannot read
    the closures that transformers makes of it."""

    window: int | None = None
    chunk: int | None = None


def _rule(function: Callable, config: PreTrainedConfig, arguments: dict) -> Rule | None:
    if _is_changed(arguments) or not getattr(config, "is_causal", True):
        return None
    if function.__name__ == "create_causal_mask":
        return Rule()
    if function.__name__ == "create_sliding_window_causal_mask":
        return Rule(window=getattr(config, "sliding_window", None))  # without one transformers raises
    if function.__name__ == "create_chunked_causal_mask":
        return Rule(chunk=getattr(config, "attention_chunk_size", None))
    return None


def _is_changed(arguments: dict) -> bool:
    return any(
        arguments.get(name) is not None for name in ("or_mask_function", "and_mask_function", "block_sequence_ids")
    )


def _rule_of(config: PreTrainedConfig | _Renamed | None) -> Rule | None:
    return config.rule if isinstance(config, _Renamed) else None


class _Renamed:
    """A config as the functions that make masks see it: with another attention, and nothing written to it."""

    def __init__(self, config: PreTrainedConfig, name: str, rule: Rule | None = None):
        self._config, self._attn_implementation, self.rule = config, name, rule

    def __getattr__(self, name: str):
        return getattr(self._config, name)

    def get_text_config(self, *args, **kwargs) -> _Renamed:
        return _Renamed(self._config.get_text_config(*args, **kwargs), self._attn_implementation)


def _mask(
    refusal: str | None,
    *,
    additive: bool = False,
    otherwise_additive: bool = False,  # where it is not spans
    rule: Rule | None = None,
    documents: Tensor | None = None,  # that nobody told
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs,
) -> Tensor | None:
    kind = dtype if additive else torch.bool
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].to(device=device, dtype=torch.bool)
        padding = padding.expand(batch_size, -1)
    tracing = torch.compiler.is_compiling()

    def dense(**rest) -> Tensor | None:
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        offsets = {"q_offset": q_offset, "kv_offset": kv_offset, "device": device, "dtype": dtype}
        rest |= {"attention_mask": attention_mask, "allow_is_bidirectional_skip": allow_is_bidirectional_skip}
        make = masking_utils.eager_mask if otherwise_additive else masking_utils.sdpa_mask
        return make(mask_function=mask_function, **sizes, **offsets, **rest)

    if is_traced():
        return dense(**kwargs)
    if mask_function is masking_utils.bidirectional_mask_function:
        # No mask is not the same as one that hides nothing: a layer that calls itself causal is so without a mask.
        if allow_is_bidirectional_skip and (padding is None or (not tracing and bool(padding.all()))):
            return None
        if padding is not None:
            return SpanMask(None, padding, q_length, kv_length, kind, refusal)
    place = torch.arange(q_length, device=device)[None] + q_offset
    queries, offsets = Queries(place, place), told() if documents is None else documents
    if offsets is not None and q_length == kv_length and mask_function is not masking_utils.bidirectional_mask_function:
        start, end = (x.long() for x in bounds(offsets.to(device), batch_size, q_length))
        queries = Queries(place - start, place, start)
    try:
        runs = _by(rule, queries) if rule and queries.start is not None else evaluate(mask_function, queries)
    except NotRecognised:
        mask = dense(**kwargs | {"allow_is_causal_skip": False})
        return mask if queries.start is None else _cut(mask, start, end)
    if queries.start is not None:
        runs = Runs((runs.lo + start).clamp(min=start), (runs.hi + start).clamp(max=end), runs.own)
    if padding is not None and not tracing:  # which would ask how many runs there are: attention joins them there
        runs = runs & _key_runs(padding).shift(kv_offset)
        padding = None
    lo, hi = runs.lo - kv_offset, runs.hi - kv_offset
    if len(lo) > 1:
        lo, hi = compact(lo.clamp(0, kv_length), hi.clamp(0, kv_length), len(lo))
        if not tracing:
            used = max(1, int((lo < hi).flatten(1).any(1).sum()))
            lo, hi = lo[:used], hi[:used]
    code = encode(lo, hi, batch_size, q_length, kv_length)
    return SpanMask(code, padding, q_length, kv_length, kind, refusal)


def _cut(mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """A dense mask without what lies in other documents."""
    key = torch.arange(mask.shape[-1], device=mask.device)
    own = ((key >= start[:, :, None]) & (key < end[:, :, None]))[:, None]
    return mask & own if mask.dtype == torch.bool else mask.masked_fill(~own, torch.finfo(mask.dtype).min)


def _refusal(config: PreTrainedConfig | None) -> str | None:
    """Models that write their attention out accept the name of an implementation, never call it, and add the mask that
    comes with the name to their scores: with a bool one, wrong results (Perceiver, GIT's text, and some forty others).
    Those that support sdpa know bool masks."""
    if config is None or supports_sdpa(type(config)):
        return None
    return (
        f"{config.model_type} models compute attention themselves, or work on their masks in code that knows no bool "
        f'ones: attn_implementation="{NAME}" does not reach it. Load the model without, and call '
        "mmkernels.accelerate(model)"
    )


class Queries(NamedTuple):
    """Of each query, int64 (B or 1, Q): the position that a mask function is asked with, which in a packed row counts
    from the document's start, and the place in the row. Tables of data (block ids, padding) have a number a place, and
    are looked up there, whatever transformers does: it asks Gemma 3's images for the positions of their documents."""

    position: Tensor
    place: Tensor
    start: Tensor | None = None  # (B, Q): the place of the first of its document, where the caller said it


def evaluate(function: Callable, q: Queries) -> Runs:
    """The keys that `function` allows, as positions."""
    # By identity first: torch.compile cannot read the cells of a closure, and follows this.
    position = q.position[None]
    if function is masking_utils.causal_mask_function:
        return Runs(torch.zeros_like(position), position + 1, True)
    if function is masking_utils.bidirectional_mask_function:
        return Runs(torch.zeros_like(position), torch.full_like(position, FAR), True)
    if torch.compiler.is_compiling() or getattr(function, "__module__", None) != masking_utils.__name__:
        raise NotRecognised(function)
    rule = _RULES.get(_name(function))
    if rule is None:
        raise NotRecognised(function)
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return rule(q, **dict(zip(function.__code__.co_freevars, cells, strict=True)))


def _by(rule: Rule, q: Queries) -> Runs:
    runs = evaluate(masking_utils.causal_mask_function, q)
    if rule.window is not None:
        return runs & _sliding(q, rule.window)
    if rule.chunk is not None:
        return runs & _chunked(q, rule.chunk, torch.zeros_like(q.position[:, 0]))
    return runs


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", "").split(".")[0]


def _and(q: Queries, mask_functions: tuple[Callable, ...]) -> Runs:
    names = [_name(function) for function in mask_functions]
    found = None
    for name, function in zip(names, mask_functions, strict=True):
        if name == "remap_positions_for_packed_sequence":
            # Positions rise by one inside a packed sequence, so there k = p(k) + (q - p(q)); other sequences are
            # excluded by the function beside it, without which this does not hold.
            if "packed_sequence_mask_function" not in names:
                raise NotRecognised(function)
            runs = _remapped(q, function)
        else:
            runs = evaluate(function, q)
        found = runs if found is None else found & runs
    return found


def _remapped(q: Queries, function: Callable) -> Runs:
    cells = dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__), strict=True))
    positions = cells["position_ids"].to(q.place.device)
    positions = positions.gather(1, q.place.expand(len(positions), -1))
    runs = evaluate(cells["mask_function"], Queries(positions, q.place, q.start))
    return runs.shift((q.position - positions)[None], own=runs.own)


def _or(q: Queries, mask_functions: tuple[Callable, ...]) -> Runs:
    found = evaluate(mask_functions[0], q)
    for function in mask_functions[1:]:
        found = found | evaluate(function, q)
    return found


def _sliding(q: Queries, sliding_window: int) -> Runs:
    position = q.position[None]
    return Runs((position - sliding_window + 1).clamp(min=0), torch.full_like(position, FAR), True)


def _sliding_both_ways(q: Queries, sliding_window: int) -> Runs:
    position = q.position[None]
    return Runs((position - sliding_window).clamp(min=0), position + sliding_window + 1, True)


def _chunked(q: Queries, chunk_size: int, left_padding: Tensor) -> Runs:
    padding = left_padding.to(q.place.device)[:, None]
    lo = torch.div(q.position - padding, chunk_size, rounding_mode="floor") * chunk_size + padding
    return Runs(lo.clamp(min=0)[None], (lo + chunk_size)[None], True)


def _offset(q: Queries, mask_function: Callable, q_offset: int | Tensor, kv_offset: int) -> Runs:
    return evaluate(mask_function, Queries(q.position + q_offset, q.place + q_offset, q.start)).shift(-kv_offset)


def _key_runs(mask: Tensor) -> Runs:
    """(B, K) bool, True where a key is seen: the same for every query. Waits for the device."""
    mask = mask[:, None]
    counts = _layouts.run_starts(mask).sum(-1)
    runs = max(1, int(counts.max())) if counts.numel() else 1
    return Runs(*(x.transpose(0, 1).long() for x in _layouts.runs_of(mask, runs)))


def _blocks(q: Queries, block_sequence_ids: Tensor) -> Runs:
    return _as_positions(q, _same_id(block_sequence_ids.to(q.place.device), q, least=0))


def _packed(q: Queries, packed_sequence_mask: Tensor) -> Runs:
    return _as_positions(q, _same_id(packed_sequence_mask.to(q.place.device), q, least=None))


def _padding(q: Queries, padding_mask: Tensor) -> Runs:
    return _as_positions(q, _key_runs(padding_mask.bool()))


def _as_positions(q: Queries, places: Runs) -> Runs:
    return places if q.position is q.place else places.shift((q.position - q.place)[None], own=places.own)


_RULES = {
    "and_masks": _and,
    "or_masks": _or,
    "sliding_window_overlay": _sliding,
    "sliding_window_bidirectional_overlay": _sliding_both_ways,
    "chunked_overlay": _chunked,
    "blockwise_overlay": _blocks,
    "packed_sequence_mask_function": _packed,
    "padding_mask_function": _padding,
    "add_offsets_to_mask_function": _offset,
}


# ---- keys of the query's own id


def _same_id(ids: Tensor, q: Queries, least: int | None) -> Runs:
    """ids: (B, K). Keys with the id of the query, if that is at least `least`, and of its document where that is known.
    Waits for the device, once a mask."""
    batch, length = ids.shape
    counts = torch.ones_like(ids, dtype=torch.bool) if least is None else ids >= least
    if q.start is not None:  # else an id that all documents have would be listed once for each
        ids = ids.long() + (q.start << 32)
    opens = torch.ones_like(ids, dtype=torch.bool)
    opens[:, 1:] = ids[:, 1:] != ids[:, :-1]
    inside = (q.place >= 0) & (q.place < length)
    at = q.place.clamp(0, length - 1).expand(batch, -1)
    own_id, seeing = ids.gather(1, at), inside & counts.gather(1, at)
    start, end = _extent(opens)
    table = _Table(opens & counts, ids)
    if table.unique():
        lo, hi = (torch.where(seeing, x.gather(1, at), 0)[None] for x in (start, end))
        return Runs(lo, hi, True)
    # One id in several places (molmo2 gives all its images the same): list them all, then drop the rows not needed.
    hit = seeing[:, None] & (table.ids[:, :, None] == own_id[:, None])  # (B, runs, Q)
    lo, hi = (torch.where(hit, table.of(x)[:, :, None], 0).transpose(0, 1) for x in (start, end))
    return Runs(*compact(lo, hi, max(1, int(hit.sum(1).max()))))


def _extent(opens: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of each key begins and ends; opens: True at the first key of a run."""
    length = opens.shape[-1]
    position = torch.arange(length, device=opens.device).expand_as(opens)
    start = position.masked_fill(~opens, 0).cummax(-1).values
    closes = torch.nn.functional.pad(opens, (0, 1), value=True)[:, 1:]
    end = (position + 1).masked_fill(~closes, length).flip(-1).cummin(-1).values.flip(-1)
    return start, end


class _Table:
    """The runs of a row that count, in a row of their own: (B, most runs of a row)."""

    def __init__(self, counted: Tensor, ids: Tensor):
        rank = counted.cumsum(-1)
        self.slots = int(rank[:, -1].max()) if rank.numel() else 0
        self.place = torch.where(counted, rank - 1, self.slots)
        self.ids = self.of(ids.long(), empty=-FAR)

    def of(self, x: Tensor, empty: int = 0) -> Tensor:
        row = torch.full((len(x), self.slots + 1), empty, dtype=torch.int64, device=x.device)
        return row.scatter_(1, self.place, x)[:, : self.slots]

    def unique(self) -> bool:
        ids = self.ids.sort(-1).values
        return not bool(((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > -FAR)).any())
