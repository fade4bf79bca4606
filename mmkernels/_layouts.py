"""The arithmetic of layouts: from offsets, image ids and image tokens to the run of keys of each query.

Int32 tensors on one device in, lo and hi out. Every shape follows from shapes and ints already known, so that nothing
waits for the device or is compiled again for the next batch; no value, however wrong, indexes outside a tensor.
A token's document is the one that holds it, n (one past the last) for a token after all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def positions(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=like.device)


def documents(cu_seqlens: Tensor, tokens: Tensor) -> Tensor:
    """The document of each token: the first that ends after it, which steps over those without tokens."""
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True, out_int32=True)


def starts(cu_seqlens: Tensor, document: Tensor) -> Tensor:
    return cu_seqlens.index_select(0, document)


def ends(cu_seqlens: Tensor, document: Tensor) -> Tensor:
    """Where each token's document ends; 0 for a token after all documents, which bounds what it sees to nothing."""
    return pad(cu_seqlens[1:], (0, 1)).index_select(0, document)


def packed(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, num_queries: int, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    query = positions(num_queries, cu_seqlens)
    document = documents(cu_seqlens, query)
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    lo, hi = starts(keys, document), ends(keys, document)
    if causal:
        stop = query + 1
        if cu_seqlens_k is not None:  # the last query of a document stands at its last key
            stop = stop + ends(cu_seqlens_k - cu_seqlens, document)
        hi = torch.minimum(stop, hi)
        if window is not None:
            lo = torch.maximum(lo, stop - window)
    return lo, hi


def unseen_keys(cu_seqlens: Tensor, cu_seqlens_k: Tensor, num_keys: int, back: int | None) -> Tensor:
    """(num_keys,) bool, of packed documents: True for keys of none, of one without queries, and for those that stand
    more than `back` keys before its first query. (The last query of a causal document sees the last key.)"""
    key = positions(num_keys, cu_seqlens_k)
    document = documents(cu_seqlens_k, key)
    queries = ends(cu_seqlens, document) - starts(cu_seqlens, document)  # below 1 after the last document
    unseen = queries < 1
    if back is not None:
        unseen |= key < ends(cu_seqlens_k, document) - queries - back
    return unseen


def image_text(cu_seqlens: Tensor, image_id: Tensor, window: int | None, window_rule: str) -> tuple[Tensor, Tensor]:
    query = positions(image_id.shape[0], image_id)
    document = documents(cu_seqlens, query)
    lo, stop = starts(cu_seqlens, document), ends(cu_seqlens, document)
    joined = (image_id[1:] == image_id[:-1]) & (image_id[1:] >= 0)  # token i + 1 continues the image of token i
    hi = torch.minimum(_run_ends(query, joined), stop)  # an image does not reach beyond its document
    if window is not None:
        first = query - (window - 1)
        if window_rule == "union":
            first = torch.minimum(first, _run_starts(query, joined))
        lo = torch.maximum(lo, first)
    return lo, hi


def _run_ends(query: Tensor, joined: Tensor) -> Tensor:
    """One past the last token of each token's run; joined: (T - 1,)."""
    last = query.shape[0]
    end = (query + 1).masked_fill(pad(joined, (0, 1)), last)
    return end.flip(0).cummin(0).values.flip(0)


def _run_starts(query: Tensor, joined: Tensor) -> Tensor:
    return query.masked_fill(pad(joined, (1, 0)), 0).cummax(0).values


def prefix_lm(cu_seqlens: Tensor, prefix_lengths: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    query = positions(num_queries, cu_seqlens)
    document = documents(cu_seqlens, query)
    prefix_end = pad(cu_seqlens[:-1] + prefix_lengths, (0, 1)).index_select(0, document)
    hi = torch.minimum(torch.maximum(query + 1, prefix_end), ends(cu_seqlens, document))
    return starts(cu_seqlens, document), hi


def media(
    media_locations: Tensor,
    seen: Tensor,
    tokens_per_image: int | Tensor,
    num_keys: int,
    cu_seqlens: Tensor | None,
    attend: str,
    empty_rows: str,
) -> tuple[Tensor, Tensor]:
    """media_locations: bool (T,) or, without documents, (B, T); seen: their running count, int32, the token included.

    A query sees images first, ..., stop - 1 of the row of all images. Those of its document are base, ..., total - 1.
    """
    stop = seen
    if cu_seqlens is None:
        base, total = torch.zeros_like(seen), None
    else:
        tokens = media_locations.shape[0]
        document = documents(cu_seqlens, positions(tokens, cu_seqlens))
        before = pad(seen, (1, 0))  # images before each token, and before the end
        base, total = (before.index_select(0, edge(cu_seqlens, document).clamp(0, tokens)) for edge in (starts, ends))
        stop = torch.minimum(seen, total)
    first = base
    if attend == "immediate":
        first = torch.maximum(base, seen - 1)
    elif attend == "group":
        first = torch.maximum(base, _group_starts(media_locations, seen))
    lo, hi = _image_offsets(first, tokens_per_image), _image_offsets(stop, tokens_per_image)
    if empty_rows == "all":
        empty = lo >= hi
        lo = torch.where(empty, _image_offsets(base, tokens_per_image), lo)
        hi = torch.where(empty, num_keys if total is None else _image_offsets(total, tokens_per_image), hi)
    return lo, hi


def _group_starts(media_locations: Tensor, seen: Tensor) -> Tensor:
    """The first image of the group that each token saw last; images of neighbouring tokens are a group."""
    opens = media_locations & ~pad(media_locations, (1, 0))[..., :-1]
    return (seen - 1).masked_fill(~opens, 0).cummax(-1).values


def _image_offsets(image: Tensor, tokens_per_image: int | Tensor) -> Tensor:
    """Key at which each image starts; an image beyond the last has no keys."""
    if not isinstance(tokens_per_image, Tensor):
        return image * tokens_per_image
    offsets = pad(tokens_per_image.cumsum(-1, dtype=torch.int32), (1, 0))
    return offsets.gather(-1, image.clamp(0, tokens_per_image.shape[-1]).long())


def runs_of(mask: Tensor, max_runs: int) -> tuple[Tensor, Tensor]:
    """(..., Tq, Tk) bool with at most `max_runs` runs a row -> lo, hi of (..., max_runs, Tq). Waits for the device."""
    *lead, queries, keys = mask.shape
    if max_runs == 1 and keys:  # as of most masks
        first = mask.view(torch.uint8).argmax(-1)
        lo, hi = (x.to(torch.int32).unsqueeze(-2) for x in (first, first + mask.sum(-1)))
        return lo, hi
    starts, ends = (side(mask).flatten(0, -2) for side in (run_starts, _ends_of_runs))
    row, first = starts.nonzero().unbind(-1)
    counts = starts.sum(-1)
    run = torch.arange(len(row), device=mask.device) - (counts.cumsum(0) - counts)[row]  # its number in the row
    lo, hi = (torch.full((len(starts), max_runs), keys, dtype=torch.int32, device=mask.device) for _ in range(2))
    lo[row, run] = first.int()
    hi[row, run] = ends.nonzero()[:, -1].int() + 1
    return tuple(x.view(*lead, queries, max_runs).transpose(-1, -2).contiguous() for x in (lo, hi))


def run_starts(mask: Tensor) -> Tensor:
    starts = mask.clone()
    starts[..., 1:] &= ~mask[..., :-1]
    return starts


def _ends_of_runs(mask: Tensor) -> Tensor:
    ends = mask.clone()
    ends[..., :-1] &= ~mask[..., 1:]
    return ends
