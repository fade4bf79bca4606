"""All that is checked: the ops, and for each sizes that are multiples of nothing, every form an argument may take,
every layout in memory."""

from __future__ import annotations

from . import contrastive, patch_embed, rotary_embed, similarity, span_attention
from .op import Case, Op

MODULES = (contrastive, patch_embed, span_attention, rotary_embed, similarity)

OPS: dict[str, Op] = {op.name: op for module in MODULES for op in module.OPS}
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)
