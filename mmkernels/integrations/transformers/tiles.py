"""Which tiles of which pictures mllama's text sees, as spans: its own code repeats the mask for every patch of a tile,
8192 tokens and 16 pictures to 7 GB.

A row that sees no tile, since its document's first picture comes later, sees all of them there (and what it takes from
them is masked after the next layer). In a pack that is all of its own document's, and of a document without pictures
none: alone it would have skipped the layer. A picture is its document's by the rows that see it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _attend
from .._tracing import is_traced
from .documents import apart, bounds, told
from .span_mask import SpanMask, encode, spans_of

NAME = "transformers.models.mllama.modeling_mllama._prepare_cross_attention_mask"


def with_spans(plain: Callable) -> Callable:
    """In the place of the function of that name: (B, T, images, tiles) of 0 and 1 -> the mask, additive, and 1 where a
    row sees a tile, (B, 1, T, 1)."""

    @functools.wraps(plain)
    def make(cross_attention_mask: Tensor, num_vision_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if is_traced():
            return plain(cross_attention_mask, num_vision_tokens=num_vision_tokens, dtype=dtype)
        if told() is not None and torch.compiler.is_compiling():
            return apart(make, cross_attention_mask, num_vision_tokens, dtype)
        seen = cross_attention_mask != 0
        sees = seen.flatten(2).any(-1)
        own = _own_pictures(seen.any(-1))[..., None].expand_as(seen)
        seen = torch.where(sees[:, :, None, None], seen, own).flatten(2)
        try:
            tiles = _attend.spans_of(seen[:, None])
        except _attend.NotSpans:  # in too many runs, or under torch.compile
            hidden = ~seen[:, None].repeat_interleave(num_vision_tokens, dim=-1)
            mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
            return mask, sees[:, None, :, None].to(dtype)
        lo, hi = (x.long() * num_vision_tokens for x in (tiles.lo, tiles.hi))
        lo, hi = (x.transpose(0, 1) if x.dim() == 3 else x[:, None] for x in (lo, hi))  # (runs, B or 1, T)
        batch, queries, keys = len(seen), seen.shape[1], seen.shape[2] * num_vision_tokens
        mask = SpanMask(encode(lo, hi, batch, queries, keys), None, queries, keys, dtype)
        return mask, sees[:, None, :, None].to(dtype)

    return make


def _own_pictures(seen: Tensor) -> Tensor:
    """seen: (B, T, images). -> the same, True for the pictures of each row's document; for all without documents."""
    offsets = told()
    if offsets is None:
        return torch.ones_like(seen)
    start, _ = bounds(offsets.to(seen.device), *seen.shape[:2])
    owner = torch.where(seen, start[:, :, None], -1).amax(1)  # (B, images)
    return owner[:, None] == start[:, :, None]


def rows_that_see(mask: Tensor, queries: int) -> Tensor:
    """Of a mask made here, (B, T, 1) bool."""
    if not isinstance(mask, SpanMask):
        return (mask[:, 0] == 0).any(-1, keepdim=True)
    spans = spans_of(mask, queries)
    return (spans.lo < spans.hi).any(1)[:, :, None]
