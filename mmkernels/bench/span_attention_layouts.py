"""Who sees whom in what a layer of a multimodal model attends over: for us as row spans, for its peers as what they
take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..spans import RowSpans


@dataclass(frozen=True)
class Segment:
    """Queries that attend to one run of keys, all of it but for what `causal` or `mask` takes away."""

    queries: slice
    keys: slice
    causal: bool = False
    mask: Tensor | None = None


class Layout:
    """Who sees whom.

    `spans` makes the row spans of what a model has, the lengths of its documents and the places of its images; we pay
    for that in every call, as FlexAttention does for its block mask. Everything else here is worked out beforehand,
    and the peers have it for nothing.
    """

    def __init__(self, spans: Callable[[], RowSpans], causal: bool = False, window: int | None = None):
        self.spans = spans
        self.causal, self.window = causal, window  # all that is hidden within a segment, unless there are masks
        self.segments: list[Segment] = self._runs()

    @cached_property
    def dense(self) -> Tensor | None:
        """The mask of the whole, None where everything is seen."""
        mask = self.spans().to_dense()
        return None if mask.all() else mask

    @cached_property
    def pairs(self) -> int:
        spans = self.spans()
        return int((spans.hi - spans.lo).clamp(min=0).sum())

    @property
    def masked(self) -> bool:
        return any(segment.mask is not None for segment in self.segments)

    @property
    def disjoint(self) -> bool:
        """Whether the segments' keys follow each other, as flash-attn's varlen calls and a padded batch want it."""
        return all(one.keys.stop == next_.keys.start for one, next_ in itertools.pairwise(self.segments))

    def _runs(self) -> list[Segment]:
        """Neighbours that see the same keys."""
        spans = self.spans()
        rows, counts = torch.stack([spans.lo, spans.hi]).unique_consecutive(dim=1, return_counts=True)
        stops = list(itertools.accumulate(counts.tolist()))
        return [
            Segment(slice(stop - count, stop), slice(*keys))
            for stop, count, keys in zip(stops, counts.tolist(), rows.T.tolist(), strict=True)
        ]


MakeLayout = Callable[[str], Layout]  # of a device


def documents(lengths: Sequence[int], window: int | None = None, images: bool = False) -> MakeLayout:
    """Packed causal text; with images, each of which sees all of itself: after every 32 tokens one of 256, as far as
    a document reaches."""
    text, image = 32, 256

    def make(device: str) -> Layout:
        offsets, total = [0, *itertools.accumulate(lengths)], sum(lengths)
        cu_seqlens = torch.tensor(offsets, device=device, dtype=torch.int32)
        if images:
            place = torch.cat([torch.arange(length) for length in lengths]) % (text + image)
            length_of = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))
            number = torch.cat([torch.arange(length) for length in lengths]) // (text + image)
            whole = (number + 1) * (text + image) <= length_of
            image_id = torch.where((place >= text) & whole, number, -1).to(device, torch.int32)
            layout = Layout(lambda: RowSpans.image_text(cu_seqlens, image_id), causal=True)
        else:
            layout = Layout(
                lambda: RowSpans.packed(cu_seqlens, num_queries=total, causal=True, window=window), True, window
            )
        tokens = [slice(*pair) for pair in itertools.pairwise(offsets)]
        if images or window:
            layout.segments = [Segment(own, own, mask=layout.dense[own, own].contiguous()) for own in tokens]
        else:
            layout.segments = [Segment(own, own, causal=True) for own in tokens]
        return layout

    return make


def blocks(query_lengths: Sequence[int], key_lengths: Sequence[int]) -> MakeLayout:
    """Each run of queries sees its run of keys, all of it."""

    def make(device: str) -> Layout:
        cu_q, cu_k = (
            torch.tensor([0, *itertools.accumulate(lengths)], device=device, dtype=torch.int32)
            for lengths in (query_lengths, key_lengths)
        )
        queries, keys = sum(query_lengths), sum(key_lengths)
        return Layout(lambda: RowSpans.packed(cu_q, cu_k, num_queries=queries, num_keys=keys))

    return make


def media(queries: int, places: Sequence[int], image_tokens: Sequence[int], attend: str) -> MakeLayout:
    """Text with images at these places, one of them at the beginning, that sees images only."""

    def make(device: str) -> Layout:
        locations = torch.zeros(queries, dtype=torch.bool)
        locations[list(places)] = True
        locations, tokens = locations.to(device), torch.tensor(image_tokens, device=device)
        return Layout(lambda: RowSpans.media(locations, tokens, num_keys=sum(image_tokens), attend=attend))

    return make


def full(queries: int, keys: int) -> MakeLayout:
    return lambda device: Layout(lambda: RowSpans.full(queries, keys, device=device))
