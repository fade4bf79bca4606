"""Who sees whom in the cases of span attention, as row spans on the CPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..spans import RowSpans

Layout = Callable[[], RowSpans]


def full(queries: int, keys: int) -> Layout:
    return lambda: RowSpans.full(queries, keys)


def last_rows(queries: int, keys: int) -> Layout:
    """The newest tokens of a cache: the last of them sees everything."""
    return lambda: RowSpans.packed(torch.tensor([0, queries]), torch.tensor([0, keys]), causal=True)


def filled(*lengths: int, spare: int = 5) -> Layout:
    """A cache a row of the batch, filled to lengths of their own, and one query for each."""
    hi = torch.tensor(lengths, dtype=torch.int32).view(-1, 1, 1)
    return lambda: RowSpans(torch.zeros_like(hi), hi, max(lengths) + spare)


def causal(lengths: Sequence[int], window: int | None = None, padding: int = 0, images: Sequence[range] = ()) -> Layout:
    """Packed documents, then `padding` tokens of none; tokens of one image see all of it."""

    def make() -> RowSpans:
        offsets, total = _offsets(lengths), sum(lengths) + padding
        if not images:
            return RowSpans.packed(offsets, num_queries=total, causal=True, window=window)
        image_id = torch.full((total,), -1)
        for number, tokens in enumerate(images):
            image_id[tokens.start : tokens.stop] = number
        return RowSpans.image_text(offsets, image_id, window=window)

    return make


def blocks(query_lengths: Sequence[int], key_lengths: Sequence[int], padding: int = 0) -> Layout:
    """The queries of a document see its keys, all of them: windows, frames, cross-attention to the last image."""
    offsets, offsets_k = _offsets(query_lengths), _offsets(key_lengths)
    return lambda: RowSpans.packed(offsets, offsets_k, num_keys=sum(key_lengths) + padding)


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def scattered(queries: int, keys: int, runs: int = 1, batch: int | None = None, empty: float = 0.1) -> Layout:
    """Runs anywhere, disjoint and ascending, some of them empty."""

    def make() -> RowSpans:
        generator = random.Random(queries * keys + runs)

        def row() -> list[tuple[int, int]]:
            cuts = sorted(generator.randint(0, keys) for _ in range(2 * runs))
            pairs = zip(cuts[::2], cuts[1::2], strict=True)
            return [(hi, lo) if generator.random() < empty else (lo, hi) for lo, hi in pairs]

        rows = torch.tensor([[row() for _ in range(queries)] for _ in range(batch or 1)], dtype=torch.int32)
        lo, hi = (rows[..., side].mT.contiguous() for side in (0, 1))  # (batch, runs, queries)
        return RowSpans(lo, hi, keys) if batch else RowSpans(lo[0], hi[0], keys)

    return make


def beyond(queries: int, keys: int) -> Layout:
    """Values that are no keys: what they mean is what they mean clamped."""
    far = 2**31 - 1
    kinds = [(-7, 5), (3, keys + 9), (-far - 1, far), (keys, far), (keys + 3, keys + 8), (-9, 0), (far, -far - 1)]

    def make() -> RowSpans:
        lo, hi = torch.tensor([kinds[i % len(kinds)] for i in range(queries)], dtype=torch.int32).T.contiguous()
        return RowSpans(lo, hi, keys)

    return make
