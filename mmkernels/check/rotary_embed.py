"""Rotary embedding: what eager PyTorch writes, and the cases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.rotary_embed import rotary_embed
from .draw import DTYPES, Draw
from .op import Call, Op
from .poison import guarded


def plain_rotary_embed(x, cos, sin, *, interleaved=False):
    """As transformers' vision towers turn their queries and keys; or interleaved, as its Cohere does."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, cos, sin = x.to(dtype), cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)
    if interleaved:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).flatten(-2)
    else:
        first, second = wide.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return (wide * cos + turned * sin).to(x.dtype)


ROTARY_EMBED = Op(
    "rotary_embed",
    ("out",),
    rotary_embed,
    plain_rotary_embed,
    typed_by="x",
    seconds=(0.1, 0.5),
    exact=("out", "d_x", "d_cos", "d_sin"),
)
OPS = (ROTARY_EMBED,)


@dataclass(frozen=True)
class RotaryCase:
    name: str
    shape: tuple[int, ...]  # (T, H, D) or (B, T, H, D)
    op: str = "rotary_embed"
    memory: str = "plain"
    tables: str = "shared"  # by the batch; or "own": each row of it has its own
    table_dtype: torch.dtype = torch.float32
    interleaved: bool = False
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES
    plain_draws: int = 0

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        *batch, tokens, _, dim = self.shape
        angles = 3 * draw.normal(*(batch if self.tables == "own" else []), tokens, dim)  # halves that differ, too
        tables = (guarded(table.to(device, self.table_dtype)) for table in (angles.cos(), angles.sin()))
        x = guarded(draw.normal(*self.shape).to(device, dtype), self.memory)
        options = {"interleaved": True} if self.interleaved else {}
        return Call(dict(zip(("x", "cos", "sin"), (x, *tables), strict=True)), options, ("x", "cos", "sin"))

    def upstream(self, draw: Draw, result: Tensor) -> Tensor:
        return draw.normal(*result.shape)


CASES = (
    RotaryCase("T 37, H 3, D 80", (37, 3, 80), quick=True),
    RotaryCase("D 2", (5, 1, 2), quick=True, plain_draws=40),
    RotaryCase("D 6, a batch", (3, 7, 2, 6), quick=True),
    RotaryCase("D 72, two halves of 36", (70, 2, 72), memory="odd"),
    RotaryCase("D 256, a batch of its own tables", (2, 33, 2, 256), tables="own", quick=True),
    RotaryCase("one third of a fused projection", (50, 4, 64), memory="fused", quick=True),
    RotaryCase("heads first", (2, 50, 4, 64), memory="heads_first", tables="own"),
    RotaryCase("heads of something wider", (40, 5, 34), memory="crop"),
    RotaryCase("one row repeated", (20, 3, 32), memory="expanded"),
    RotaryCase("half tables", (45, 3, 96), table_dtype=torch.bfloat16),
    RotaryCase("beyond 2^31", (3, 2, 32), memory="far", dtypes=(torch.bfloat16,)),
    RotaryCase("T 1100, several threads", (1100, 4, 80)),
    RotaryCase("interleaved, T 37, H 3, D 80", (37, 3, 80), interleaved=True, quick=True),
    RotaryCase("interleaved, D 2", (5, 1, 2), interleaved=True, quick=True, plain_draws=40),
    RotaryCase("interleaved, D 70", (40, 5, 70), memory="odd", interleaved=True),
    RotaryCase(
        "interleaved, a batch of its own tables", (2, 33, 4, 64), "rotary_embed", "fused", "own", interleaved=True
    ),
)
