"""Rotary embedding in plain PyTorch: the definition of right.

out = x c + R x s, where R (a, b) = (-b, a) on the halves of a head, or interleaved, on every two neighbours in it;
transposed, d_x = d_out c + R^T (d_out s), where R^T (a, b) = (b, -a).
"""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(x: Tensor) -> str | None:
    return None


def rotary_embed(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    """x: (B, T, H, D); cos, sin: (B or 1, T, D). -> as x, contiguous."""
    wide, cos, sin = x.to(cos.dtype), cos[:, :, None], sin[:, :, None]
    turned = -rotate(wide * sin, interleaved) if transposed else rotate(wide, interleaved) * sin
    return (wide * cos + turned).to(x.dtype).contiguous()


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """R x."""
    if interleaved:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-second, first), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
