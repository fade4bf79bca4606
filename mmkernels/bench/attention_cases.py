"""Span attention's cases: what a layer of a multimodal model attends over, forward and in training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..check.draw import Draw
from ..check.op import Call
from ..ops.span_attention import span_attention
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


def documents(lengths: Sequence[int], window: int | None = None, images: bool = False) -> Callable[[str], Layout]:
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


def blocks(query_lengths: Sequence[int], key_lengths: Sequence[int]) -> Callable[[str], Layout]:
    """Each run of queries sees its run of keys, all of it."""

    def make(device: str) -> Layout:
        cu_q, cu_k = (
            torch.tensor([0, *itertools.accumulate(lengths)], device=device, dtype=torch.int32)
            for lengths in (query_lengths, key_lengths)
        )
        queries, keys = sum(query_lengths), sum(key_lengths)
        return Layout(lambda: RowSpans.packed(cu_q, cu_k, num_queries=queries, num_keys=keys))

    return make


def media(queries: int, places: Sequence[int], image_tokens: Sequence[int], attend: str) -> Callable[[str], Layout]:
    """Text with images at these places, one of them at the beginning, that sees images only."""

    def make(device: str) -> Layout:
        locations = torch.zeros(queries, dtype=torch.bool)
        locations[list(places)] = True
        locations, tokens = locations.to(device), torch.tensor(image_tokens, device=device)
        return Layout(lambda: RowSpans.media(locations, tokens, num_keys=sum(image_tokens), attend=attend))

    return make


def full(queries: int, keys: int) -> Callable[[str], Layout]:
    return lambda device: Layout(lambda: RowSpans.full(queries, keys, device=device))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, backend: str | None = None) -> Tensor:
    """Ours, from what a model has."""
    return span_attention(q, k, v, layout.spans(), backend=backend)


@dataclass(frozen=True)
class AttentionCase:
    name: str
    layout: Callable[[str], Layout]
    heads: tuple[int, int] = (16, 16)  # of queries, of keys
    dim: int = 64
    op: str = "span_attention"
    batch: int | None = None
    passes: tuple[str, ...] = ("fwd", "fwd_bwd")
    devices: tuple[str, ...] = ("cpu", "cuda")  # measured there unless others are asked for
    compiled: tuple[str, ...] = ()  # devices where FlexAttention is a peer; each pass takes half a minute
    quick: bool = False

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        layout = self.layout(device)
        spans = layout.spans()
        sizes = [(spans.num_queries, self.heads[0]), (spans.num_keys, self.heads[1]), (spans.num_keys, self.heads[1])]
        batch = [self.batch] if self.batch else []
        tensors = {
            name: draw.normal(*batch, *size, self.dim).to(device, dtype)
            for name, size in zip("qkv", sizes, strict=True)
        }
        return Call(tensors, {"layout": layout}, tuple(tensors))

    def upstream(self, draw: Draw, call: Call) -> Tensor:
        q = call.tensors["q"]
        return draw.normal(*q.shape).to(q)

    @cached_property
    def _pairs(self) -> int:
        return self.layout("cpu").pairs * (self.batch or 1) * self.heads[0]

    def flops(self, direction: str) -> int:
        """Of the pairs that see each other. Forward: the products with keys and values. Backward the scores once more,
        those with the values' gradients, and one for each of the three gradients."""
        products = 7 if direction == "fwd_bwd" else 2
        return 2 * products * self._pairs * self.dim

    def bytes(self, direction: str, call: Call) -> int:
        """Queries, keys, values and the result once; the same again for their gradients."""
        once = call.tensors["q"].nbytes + sum(x.nbytes for x in call.tensors.values())
        return once * (2 if direction == "fwd_bwd" else 1)

    def eager_bytes(self, direction: str, call: Call) -> int:
        """About what SDPA with a mask holds: the mask as numbers, the keys repeated for their groups, a result each."""
        q, k = call.tensors["q"], call.tensors["k"]
        repeated = 2 * k.nbytes * (self.heads[0] // self.heads[1] - 1)
        mask = q.shape[-3] * k.shape[-3] * k.element_size()
        return mask + repeated + 2 * self.bytes(direction, call)


_LENGTHS = (64, 1024, 300, 77, 577, 128, 900, 32)
_LONG = (512, 2048, 1024, 3072, 256, 4096, 1800, 900, 2676)  # 16384 tokens
_CPU, _GPU, _ASKED, _BOTH = ("cpu",), ("cuda",), (), ("cpu", "cuda")
_TILES = ((0, 512, 513), (2 * 1601, 1601, 1601))  # one picture of two tiles, then two of one tile side by side
_SMALL = {"devices": _ASKED, "quick": True}
_LLAMA = {"heads": (32, 8), "dim": 128}
_TRAINED = {"heads": (16, 16), "dim": 128, "devices": _GPU, "compiled": _GPU}

ATTENTION: tuple[AttentionCase, ...] = (
    AttentionCase("packed-small", documents((64, 30, 77)), (4, 2), **_SMALL),
    AttentionCase("cross-small", media(64, (0, 40), (50, 77), "immediate"), (4, 4), 80, **_SMALL),
    AttentionCase("packed", documents(_LENGTHS), compiled=_CPU),
    AttentionCase("packed-gqa", documents(_LENGTHS), (8, 2), 128),
    AttentionCase("packed-images", documents(_LENGTHS, images=True), compiled=_CPU),
    AttentionCase("equal-lengths", documents((512,) * 8), (8, 8)),
    AttentionCase("sliding-window", documents((4096,), window=512), (4, 1), 256, compiled=_BOTH),
    AttentionCase("full-2048", full(2048, 2048)),
    AttentionCase("full-2048-d128", full(2048, 2048), (8, 8), 128),
    AttentionCase("vision-windows", blocks((64,) * 64, (64,) * 64), (8, 8), 80),
    AttentionCase("cross-immediate", media(1024, range(0, 1024, 256), (1601,) * 4, "immediate")),
    AttentionCase("cross-previous", media(1024, range(0, 1024, 256), (1601,) * 4, "previous"), (8, 8)),
    AttentionCase("cross-tiles", media(1024, *_TILES, "group"), (8, 8)),
    AttentionCase("decode-8", full(1, 4096), **_LLAMA, batch=8, passes=("fwd",)),
    AttentionCase("decode-1", full(1, 4096), **_LLAMA, batch=1, passes=("fwd",)),
    AttentionCase("packed-16k", documents(_LONG), **_TRAINED),
    AttentionCase("packed-16k-images", documents(_LONG, images=True), **_TRAINED),
    AttentionCase("full-8192", full(8192, 8192), **_TRAINED),
    AttentionCase("cross-8k", media(8192, range(0, 8192, 512), (1601,) * 16, "immediate"), **_TRAINED),
)
