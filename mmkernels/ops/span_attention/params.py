"""What a call of span attention says beside its tensors: one record for all backends. Only op.py takes it apart."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...spans import Documents, RowSpans


class Params(NamedTuple):
    """Which keys each query sees, and how scores are made."""

    lo: Tensor  # (B or 1, runs, Tq), contiguous
    hi: Tensor
    hulls: Tensor | None  # of `RowSpans.hulls`, contiguous; None: not made
    documents: Documents | None  # of `RowSpans.documents`, for the one backend that wants them
    scale: float
    softcap: float  # 0: none

    def with_hulls(self, num_keys: int) -> Params:
        return self if self.hulls is not None else self._replace(hulls=RowSpans(self.lo, self.hi, num_keys).hulls())
