"""Row spans as FlexAttention takes masks: which blocks of keys a block of queries computes, and which of them whole.

A query whose run is lo to hi touches the blocks from lo / size to (hi - 1) / size, and covers those from lo / size,
rounded up, to before hi / size. Both are runs of blocks, so that what a block of queries touches are the running sums
of marks where runs begin and end: O(tokens + blocks of queries x blocks of keys) memory, and the mask is never made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad


def block_mask(lo: Tensor, hi: Tensor, num_keys: int, block_size: tuple[int, int]) -> BlockMask:
    """lo, hi: (batch or 1, runs, queries) int32; block_size: of queries and of keys."""
    num_queries, (rows, columns) = lo.shape[-1], block_size
    lo, hi = lo.clamp(0, num_keys), hi.clamp(0, num_keys)
    hi = torch.maximum(lo, hi)
    blocks = -(-num_queries // rows), -(-num_keys // columns)
    touched = _queries_of(lo // columns, -(-hi // columns), lo < hi, rows, blocks)
    first, last = -(-lo // columns), hi // columns
    covered = _queries_of(first, torch.maximum(first, last), first < last, rows, blocks)
    # Runs of a query are disjoint, so that no two of them cover a block. A block of fewer queries is not whole.
    whole = covered == rows
    partial = _listed((touched > 0) & ~whole)
    return BlockMask.from_kv_blocks(
        *partial,
        *_listed(whole),
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(lo, hi),
        seq_lengths=(num_queries, num_keys),
    )


def _queries_of(first: Tensor, last: Tensor, counts: Tensor, rows: int, blocks: tuple[int, int]) -> Tensor:
    """How many runs of queries of each block, those that count, hold each block of keys between first and last:
    (batch, blocks of queries, blocks of keys)."""
    shape = (len(first), blocks[0], blocks[1] + 1)
    marks = torch.zeros(shape, dtype=torch.int32, device=first.device)
    for place, sign in ((first, 1), (last, -1)):
        index, mark = (_by_block(x, rows, blocks[0]) for x in (place, counts.int() * sign))
        marks.scatter_add_(-1, index.long(), mark)
    return marks.cumsum(-1)[..., :-1]


def _by_block(x: Tensor, rows: int, blocks: int) -> Tensor:
    """(batch, runs, queries) -> (batch, blocks, runs x rows); what fills the last block up counts as 0."""
    filled = pad(x, (0, blocks * rows - x.shape[-1])).unflatten(-1, (blocks, rows))
    return filled.transpose(1, 2).flatten(2)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, blocks of queries, blocks of keys) bool -> how many of a row, and which, those first; with an axis of
    heads."""
    order = torch.argsort((~chosen).to(torch.int8), dim=-1, stable=True)
    return chosen.sum(-1)[:, None].int(), order[:, None].int()


def _mask_mod(lo: Tensor, hi: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    batch, runs, _ = lo.shape

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        row = b if batch > 1 else b * 0
        seen = (lo[row, 0, q] <= kv) & (kv < hi[row, 0, q])
        for run in range(1, runs):
            seen = seen | ((lo[row, run, q] <= kv) & (kv < hi[row, run, q]))
        return seen

    return mask_mod
