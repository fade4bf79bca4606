"""Sequence packing for training: which documents share a pack."""

from .plan import Limits, plan, shard, stream

__all__ = ["Limits", "plan", "shard", "stream"]
