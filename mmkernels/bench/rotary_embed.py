"""Rotary embedding: what transformers computes, and the layers of vision towers and language models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..check.draw import Draw
from ..check.op import Call
from ..check.rotary_embed import ROTARY_EMBED, plain_rotary_embed
from .op import PASSES, Measured, Peer, Series


def _peers(call: Call) -> list[Peer]:
    return [Peer("transformers' arithmetic", plain_rotary_embed)]


OPS = (Measured(ROTARY_EMBED, _peers),)


@dataclass(frozen=True)
class RotaryCase:
    """Queries and keys of a layer side by side in its fused projection, as (tokens, heads of both, numbers a head)."""

    name: str
    tokens: int
    heads: int
    dim: int
    op: str = "rotary_embed"
    interleaved: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: tuple[str, ...] = ()
    quick: bool = False
    passes: tuple[str, ...] = PASSES

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        projected = draw.normal(self.tokens, self.heads * 3 // 2, self.dim).to(device, dtype)
        angles = draw.normal(self.tokens, self.dim // 2).to(device)
        angles = angles.repeat_interleave(2, 1) if self.interleaved else angles.repeat(1, 2)
        tensors = {"x": projected[:, : self.heads], "cos": angles.cos().float(), "sin": angles.sin().float()}
        return Call(tensors, {"interleaved": self.interleaved}, ("x",))

    def upstream(self, draw: Draw, call: Call) -> Tensor:
        return draw.normal(self.tokens, self.heads, self.dim).to(call.tensors["x"])

    def flops(self, direction: str) -> int:
        return (6 if direction == "fwd_bwd" else 3) * self.tokens * self.heads * self.dim

    def bytes(self, direction: str, call: Call) -> int:
        tables = call.tensors["cos"].nbytes + call.tensors["sin"].nbytes
        once = 2 * self.tokens * self.heads * self.dim * call.tensors["x"].element_size() + tables
        return once * (2 if direction == "fwd_bwd" else 1)

    def eager_bytes(self, direction: str, call: Call) -> int:
        return 6 * self.bytes(direction, call)


CASES = (
    RotaryCase("300x4x64", 300, 4, 64, devices=(), quick=True),
    RotaryCase("qwen-vision-5476x32x80", 5476, 32, 80, compiled=("cpu", "cuda")),
    RotaryCase("text-4096x40x128", 4096, 40, 128),
    RotaryCase("interleaved-4096x40x128", 4096, 40, 128, interleaved=True),
)

_TOKENS = {n: RotaryCase(f"{n}x32x80", n, 32, 80) for n in (64, 256, 1024, 4096, 16384)}
GROWTH = (Series("rotary_embed", "tokens", "tokens, 32 heads of 80", _TOKENS),)
