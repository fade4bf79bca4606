"""Row spans as FlashMask takes masks: for each key the rows, that is the queries, that it is hidden from.

What a key is hidden from are runs of queries, of which FlashMask says two at most. A run begins where a key is in a run
of the query before and not in one of this, and ends where it is the other way round. Both are few runs of keys a query,
whose running counts tell how many runs each key has before they are written out: O(queries x runs + keys) memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST = 2  # runs of queries that FlashMask can hide a key from


class FlashMask(NamedTuple):
    """Spans in the words of FlashMask's `flashmask_attention`, whose keyword arguments these are: what
    `RowSpans.to_flashmask` gives, and says of them."""

    startend_row_indices: Tensor
    causal: bool


def flash_mask(lo: Tensor, hi: Tensor, num_keys: int) -> FlashMask:
    """lo, hi: (batch or 1, runs, queries) int32."""
    num_queries = lo.shape[-1]
    lo = lo.clamp(0, num_keys)
    hi = torch.maximum(lo, hi.clamp(0, num_keys))
    hidden, shown = _changes(lo, hi, num_keys)
    counts = _counts(*hidden, num_keys)
    if (counts > MOST).any():
        raise ValueError(_cannot_say(lo, hi, counts))
    starts, ends = (_two(*_keys_and_rows(*x, num_keys), counts, num_queries) for x in (hidden, shown))

    if num_queries == num_keys:
        # What lies above the diagonal `causal` says, and the columns the rest. No mask that is not square is called so:
        # versions of FlashMask refuse it, or let the diagonal end at the last key.
        diagonal = torch.arange(num_keys, dtype=torch.int32, device=lo.device)
        above = (diagonal == 0) | ((starts[0] == 0) & (ends[0] >= diagonal))
        below = torch.maximum(starts, diagonal)
        left = below < ends
        if (above & ~left.all(0)).all():
            lts, lte = (torch.where(left[0], *x) for x in (below, ends))
            return _columns(lts, causal=True) if (lte == num_queries).all() else _columns(lts, lte, causal=True)

    # FlashMask's backward passes count on the upper run to end before the lower one begins. A single run is the lower
    # if it reaches the last query, else the upper. A missing one is empty at its end of the column.
    upper = ends[0] < num_queries
    uts, ute = (torch.where(upper, x[0], 0) for x in (starts, ends))
    lts, lte = (torch.where(upper, x[1], x[0]) for x in (starts, ends))
    if (uts == 0).all() and (lte == num_queries).all():
        return _columns(lts, ute, causal=False)
    return _columns(lts, lte, uts, ute, causal=False)


def _columns(*columns: Tensor, causal: bool) -> FlashMask:
    return FlashMask(torch.stack(columns, -1)[:, None], causal)


_Runs = tuple[Tensor, Tensor, Tensor]  # first and last (exclusive) key, and whether it counts: (batch, runs, rows)


def _changes(lo: Tensor, hi: Tensor, num_keys: int) -> tuple[_Runs, _Runs]:
    """Of each row, and of one after the last, the runs of keys that the row before sees and it does not, and those that
    it sees and the row before does not. Rows that see every key stand before the first and after the last."""
    runs = lo.shape[1]
    lo, hi = pad(lo, (1, 1)), pad(hi, (1, 1), value=num_keys)
    places = torch.cat([lo[..., :-1], hi[..., :-1], lo[..., 1:], hi[..., 1:]], 1)
    places, order = places.sort(1)
    kind = order // runs
    # Between two neighbouring places all keys are alike: within a run of either row, or not.
    before, after = (
        ((kind == begin).int() - (kind == begin + 1).int()).cumsum(1, dtype=torch.int32)[:, :-1] > 0 for begin in (0, 2)
    )
    first, last = places[:, :-1], places[:, 1:]
    some = first < last
    return (first, last, some & before & ~after), (first, last, some & after & ~before)


def _counts(first: Tensor, last: Tensor, chosen: Tensor, num_keys: int) -> Tensor:
    """How many of the chosen runs hold each key: (batch, keys)."""
    marks = torch.zeros(len(first), num_keys + 1, dtype=torch.int32, device=first.device)
    for place, sign in ((first, 1), (last, -1)):
        marks.scatter_add_(1, place.flatten(1).long(), chosen.flatten(1).int() * sign)
    return marks.cumsum(1, dtype=torch.int32)[:, :-1]


def _keys_and_rows(first: Tensor, last: Tensor, chosen: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """The keys of the chosen runs, counted through the batch, and the row of each."""
    at = chosen.nonzero(as_tuple=True)
    (batch, _, row), first, last = at, first[at], last[at]
    lengths = last - first
    run = torch.repeat_interleave(lengths)
    within = torch.arange(len(run), device=run.device) - (lengths.cumsum(0) - lengths)[run]
    return (batch * num_keys + first)[run] + within, row[run].int()


def _two(keys: Tensor, rows: Tensor, counts: Tensor, num_queries: int) -> Tensor:
    """The rows of each key, the first and the second, num_queries where there is none: (2, batch, keys)."""
    none = torch.full_like(counts.flatten(), num_queries)
    first = none.scatter_reduce(0, keys, rows, "amin")
    last = none.scatter_reduce(0, keys, rows, "amax", include_self=False)
    return torch.stack([first, torch.where(counts.flatten() == MOST, last, none)]).unflatten(1, counts.shape)


def _cannot_say(lo: Tensor, hi: Tensor, counts: Tensor) -> str:
    batch, key = (counts > MOST).nonzero()[0].tolist()
    hidden = ~((lo[batch] <= key) & (key < hi[batch])).any(0)
    edges = pad(hidden.int(), (1, 1)).diff()
    runs = zip((edges > 0).nonzero().flatten().tolist(), (edges < 0).nonzero().flatten().tolist(), strict=True)
    rows = [str(start) if end == start + 1 else f"{start} to {end - 1}" for start, end in runs]
    where = f" of row {batch} of the batch" if len(counts) > 1 else ""
    return (
        f"RowSpans.to_flashmask: key {key}{where} is hidden from {len(rows)} runs of queries, {', '.join(rows[:4])}"
        f"{', ...' if len(rows) > 4 else ''}; FlashMask says {MOST} at most, to_block_mask and to_intervals any number"
    )
