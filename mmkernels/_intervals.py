"""Row spans as cuDNN's flex attention takes masks: for each query the ends of the intervals of keys that it sees."""

from __future__ import annotations

import torch
from torch import Tensor


def intervals(lo: Tensor, hi: Tensor, num_keys: int) -> Tensor:
    """lo, hi: (batch or 1, runs, queries) int32."""
    lo, hi = lo.clamp(0, num_keys), hi.clamp(0, num_keys)
    # Ends may not fall, and an empty run may stand anywhere: it moves to key 0, before all others. Since runs are
    # disjoint, their begins and their ends are in one order.
    lo, hi = (x.masked_fill(lo >= hi, 0).sort(1).values for x in (lo, hi))
    # The first interval begins at key 0, unsaid. It is always empty: what is made does not depend on the values.
    ends = torch.cat([torch.zeros_like(lo[:, :1]), torch.stack([lo, hi], 2).flatten(1, 2)], 1)
    return ends.transpose(0, 1).flatten(1)[None].contiguous()
