"""All that is measured: the ops, and for each the sizes of real training runs and real models."""

from __future__ import annotations

from . import contrastive, patch_embed, rotary_embed, similarity, span_attention
from .op import Case, Measured, Series

MODULES = (contrastive, patch_embed, span_attention, rotary_embed, similarity)

OPS: dict[str, Measured] = {measured.op.name: measured for module in MODULES for measured in module.OPS}
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)
GROWTH: tuple[Series, ...] = tuple(series for module in MODULES for series in module.GROWTH)
