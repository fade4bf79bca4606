"""Sequence packing for training: which documents share a pack, how they are laid into one row, and proof that each of
them is computed as if it were alone."""

from .collate import Collator
from .dataset import PackedDataset
from .plan import Limits, plan, shard, stream
from .prove import assert_equal_to_separate, assert_no_leak

__all__ = [
    "Collator", "Limits", "PackedDataset", "assert_equal_to_separate", "assert_no_leak", "plan", "shard", "stream",
]  # fmt: skip
