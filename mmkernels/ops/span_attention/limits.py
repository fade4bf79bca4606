"""What kernels of span attention say of calls that they do not serve."""

from __future__ import annotations

from torch import Tensor


def too_wide(q: Tensor, k: Tensor, v: Tensor, widest: int) -> str | None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[-1] > widest:
            return f"it serves heads of up to {widest} numbers, those of {name} have {x.shape[-1]}"
    return None
