"""Row spans in the place of a mask: what a model hands from its mask function to its attention layers.

An int64 tensor (B, runs, Q, K) with stride 0 along K, so 8 bytes a query and run, each element lo << 32 | hi. Unlike an
attribute on a tensor it survives slices, copies to a device, repeats, checkpointing and torch.compile; and code that
takes it for a mask fails aloud, since neither scaled_dot_product_attention nor nn.MultiheadAttention take int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...spans import RowSpans


def encode(lo: Tensor, hi: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """lo, hi: (runs, B or 1, Q or 1) of any values."""
    lo, hi = lo.clamp(0, keys), hi.clamp(0, keys)
    code = ((lo << 32) | torch.maximum(lo, hi)).expand(-1, batch, queries)
    return code.transpose(0, 1).unsqueeze(-1).expand(-1, -1, -1, keys)


def is_code(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int64


def decode(code: Tensor, queries: int | None = None) -> RowSpans:
    """Spans with a batch axis, of the first `queries` of the rows."""
    first = code[:, :, :queries, 0]
    return RowSpans((first >> 32).int(), (first & 0xFFFFFFFF).int(), code.shape[-1])
