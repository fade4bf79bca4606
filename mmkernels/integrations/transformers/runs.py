"""Sets of runs of keys, a set for each query, and their unions and intersections.

The masks of transformers are such sets, put together from a few simple ones (masks.py). Here `lo` and `hi` are int64 of
shape (runs, B or 1, Q or 1), over absolute positions of keys; the runs of a query are disjoint, ascending and do not
touch, and one with lo >= hi is empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 1 << 30  # beyond every key


class Runs:
    """`own`: there is one run, and it holds the query's own position wherever it is not empty. The union of two such
    sets is one run again, which is what keeps causal text with bidirectional images at one without a look at the data.
    """

    def __init__(self, lo: Tensor, hi: Tensor, own: bool = False):
        self.lo, self.hi, self.own = lo, hi, own

    def shift(self, by: Tensor | int, own: bool = False) -> Runs:
        return Runs(self.lo + by, self.hi + by, own)

    def __and__(self, other: Runs) -> Runs:
        lo = torch.maximum(self.lo[:, None], other.lo[None]).flatten(0, 1)
        hi = torch.minimum(self.hi[:, None], other.hi[None]).flatten(0, 1)
        most = len(self.lo) + len(other.lo) - 1  # of the pairs that are not empty
        if most > 1:
            lo, hi = compact(lo, hi, most)
        return Runs(lo, hi, self.own and other.own)

    def __or__(self, other: Runs) -> Runs:
        if self.own and other.own:
            some, more = self.lo < self.hi, other.lo < other.hi
            lo = torch.minimum(torch.where(some, self.lo, FAR), torch.where(more, other.lo, FAR))
            hi = torch.maximum(torch.where(some, self.hi, 0), torch.where(more, other.hi, 0))
            return Runs(lo, hi, True)
        shape = torch.broadcast_shapes(*(x.shape[1:] for x in (self.lo, self.hi, other.lo, other.hi)))
        lo = torch.cat([x.lo.expand(-1, *shape) for x in (self, other)])
        hi = torch.cat([x.hi.expand(-1, *shape) for x in (self, other)])
        return Runs(*_joined(*compact(lo, hi, len(lo))))


def compact(lo: Tensor, hi: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Ascending, the empty ones last; the first `runs` of them."""
    lo, hi = torch.broadcast_tensors(lo, hi)
    empty = lo >= hi
    lo, hi = lo.masked_fill(empty, FAR), hi.masked_fill(empty, FAR)
    lo, order = lo.sort(dim=0, stable=True)
    return lo[:runs], hi.gather(0, order)[:runs]


def _joined(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Of ascending runs that may overlap or touch: each takes in the one before it where they meet."""
    los, his = list(lo), list(hi)
    for r in range(1, len(los)):
        meet = (his[r - 1] >= los[r]) & (los[r - 1] < his[r - 1]) & (los[r] < his[r])
        los[r] = torch.where(meet, los[r - 1], los[r])
        his[r] = torch.where(meet, torch.maximum(his[r - 1], his[r]), his[r])
        his[r - 1] = torch.where(meet, los[r - 1], his[r - 1])
    return compact(torch.stack(los), torch.stack(his), len(los))
