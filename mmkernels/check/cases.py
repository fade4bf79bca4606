"""All that is checked: the ops, and for each sizes that are multiples of nothing, every form an argument may take,
every layout in memory."""

from __future__ import annotations

from . import contrastive, patch_embed, rotary_embed, span_attention
from .op import Case, Op

HOT_PATHS = (contrastive, patch_embed, span_attention, rotary_embed)

OPS: dict[str, Op] = {op.name: op for hot_path in HOT_PATHS for op in hot_path.OPS}
CASES: tuple[Case, ...] = tuple(case for hot_path in HOT_PATHS for case in hot_path.CASES)
