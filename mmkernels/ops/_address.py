"""Handing on a tensor that a call may go without."""

from __future__ import annotations

from torch import Tensor


def address(x: Tensor | None) -> int:
    """Where the numbers of x begin, which must outlive the call; 0 for none."""
    return 0 if x is None else x.data_ptr()
