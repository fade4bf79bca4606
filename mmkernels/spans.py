"""Row spans: which keys each query of an attention call sees.

In packed documents, causal text, bidirectional images inside it, sliding windows, prefix language models,
cross-attention to the last image, and one-row decoding alike, a query i sees one contiguous run of keys,
lo[i] <= j < hi[i]. Two int32 numbers a query say it all: O(T) memory, made on the device without waiting for it,
changed from batch to batch without a recompile. Layouts with gaps take several runs a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

HULL_ROWS = 32  # queries that share an entry of `RowSpans.hulls`


class RowSpans:
    """The runs of keys that each query sees: query i sees key j if lo[r, i] <= j < hi[r, i] for one of the runs r.

    Args:
        lo, hi: int32 tensors on one device, of shape (num_queries,), (runs, num_queries), or, for tensors with a batch
            axis, (batch, runs, num_queries). The runs of a query are disjoint and ascending; a run with lo >= hi is
            empty, and a query whose runs are all empty sees nothing. Values beyond [0, num_keys] count as the nearer
            end. Neither is checked, since that would wait for the device; kernels read nothing out of bounds.
        num_keys: number of keys (of one row of the batch, where there is a batch axis).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device; the message names it.
    """

    def __init__(self, lo: Tensor, hi: Tensor, num_keys: int):
        for name, value in (("lo", lo), ("hi", hi)):
            if not isinstance(value, Tensor):
                raise TypeError(f"RowSpans: {name} must be a torch.Tensor, got {type(value).__name__}")
            if value.dtype != torch.int32:
                raise TypeError(f"RowSpans: {name} has dtype {value.dtype}; it must be torch.int32")
        if lo.shape != hi.shape or not 1 <= lo.dim() <= 3 or (lo.dim() > 1 and lo.shape[-2] == 0):
            raise ValueError(
                f"RowSpans: lo has shape {tuple(lo.shape)}, hi {tuple(hi.shape)}; they must be equal, (num_queries,), "
                "(runs, num_queries) or (batch, runs, num_queries) with at least one run"
            )
        if lo.device != hi.device:
            raise ValueError(f"RowSpans: lo is on {lo.device}, hi on {hi.device}; move one to the other's")
        if num_keys < 0:
            raise ValueError(f"RowSpans: num_keys is {num_keys}; it must be at least 0")
        self.lo, self.hi, self.num_keys = lo, hi, num_keys
        self._hulls: Tensor | None = None

    @property
    def num_queries(self) -> int:
        return self.lo.shape[-1]

    @property
    def runs(self) -> int:
        return self.lo.shape[-2] if self.lo.dim() > 1 else 1

    @property
    def batch(self) -> int | None:
        """Length of the batch axis; None for spans that have none."""
        return self.lo.shape[0] if self.lo.dim() == 3 else None

    @property
    def device(self) -> torch.device:
        return self.lo.device

    def __repr__(self) -> str:
        return (
            f"RowSpans(num_queries={self.num_queries}, num_keys={self.num_keys}, runs={self.runs}, "
            f"batch={self.batch}, device={self.device})"
        )

    def to(self, device: torch.device | str) -> RowSpans:
        """The same spans on another device."""
        return RowSpans(self.lo.to(device), self.hi.to(device), self.num_keys)

    def to_dense(self) -> Tensor:
        """The mask, bool, True where a query sees a key: (num_queries, num_keys), or with a batch axis before."""
        keys = torch.arange(self.num_keys, device=self.device, dtype=torch.int32)
        lo, hi = (x if x.dim() > 1 else x[None] for x in (self.lo, self.hi))
        return ((lo[..., None] <= keys) & (keys < hi[..., None])).any(-3)

    def hulls(self) -> Tensor:
        """What HULL_ROWS neighbouring queries have in common: int32 (batch or 1, runs, num_queries / HULL_ROWS up, 4).

        The four numbers are min lo, max hi over the queries that see anything (num_keys, 0 if none does): outside, no
        query sees a key; and max lo, min hi over all of them (with an empty query num_keys, 0): inside, every one does.
        Computed once and kept: kernels that work by blocks of queries find in it what to skip and what needs no mask.
        """
        if self._hulls is None:
            self._hulls = self._make_hulls()
        return self._hulls

    def _make_hulls(self) -> Tensor:
        shape = (self.batch or 1, self.runs, self.num_queries)
        lo, hi = (x.reshape(shape).clamp(0, self.num_keys) for x in (self.lo, self.hi))
        empty = lo >= hi
        lo, hi = lo.masked_fill(empty, self.num_keys), hi.masked_fill(empty, 0)
        blocks = -(-self.num_queries // HULL_ROWS)
        missing = blocks * HULL_ROWS - self.num_queries

        def reduce(x: Tensor, of_missing: int, largest: bool) -> Tensor:
            x = torch.nn.functional.pad(x, (0, missing), value=of_missing).unflatten(-1, (blocks, HULL_ROWS))
            return x.amax(-1) if largest else x.amin(-1)

        return torch.stack(
            [
                reduce(lo, self.num_keys, largest=False),
                reduce(hi, 0, largest=True),
                reduce(lo, 0, largest=True),
                reduce(hi, self.num_keys, largest=False),
            ],
            -1,
        )
