"""Rotary position embedding, which turns pairs of numbers of every query and key by the angles of its token."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .. import _checks
from . import op

_NAME = "rotary_embed"


def rotary_embed(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str | None = None
) -> Tensor:
    """x cos + rotate_half(x) sin, where rotate_half((a, b)) = (-b, a): queries or keys before they attend.

    Su et al. 2021, https://arxiv.org/abs/2104.09864; what transformers calls `apply_rotary_pos_emb` and
    `apply_rotary_pos_emb_vision`, in one pass over x.

    Args:
        x: (T, H, D), or with a batch axis (B, T, H, D), D even; float32, bfloat16 or float16 (the reference backend:
            float64 too). The last stride must be 1, the others may be anything: queries and keys that lie side by side
            in a fused projection are turned in one call.
        cos, sin: of the angles, (T, D), or with a batch axis, (B, T, D) or (1, T, D) for the whole batch; floating, of
            any dtype: a number for each of a head, in its order. With D / 2 in place of D, a number for each pair.
        interleaved: what is turned together. False: number i of the first half of a head and number i of the other, as
            GPT-NeoX, Llama and Qwen-VL have it. True: two neighbours, as RoFormer, GPT-J and Cohere have it, where
            rotate_half((a, b, c, d, ...)) = (-b, a, -d, c, ...).
        backend: "triton", "cpu", "reference"; None takes the fastest of them that supports the call.

    Returns:
        The shape and dtype of x, contiguous; differentiable, any number of times. Computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype, shape, stride or device; the message names it.
        BackendUnavailable: the backend asked for cannot serve the call.
    """
    _checks.floating(_NAME, "x", x)
    _check_x(x)
    for label, table in (("cos", cos), ("sin", sin)):
        _checks.floating(_NAME, label, table)
        _check_table(label, table, x)
    if cos.shape != sin.shape:
        raise ValueError(f"{_NAME}: cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}; they must be equal")
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(wide).contiguous() for table in (cos, sin))
    cos, sin = (table if table.dim() == 3 else table[None] for table in (cos, sin))
    if cos.shape[-1] < x.shape[-1]:
        cos, sin = (_of_pairs(table, interleaved) for table in (cos, sin))
    batched = x.dim() == 4
    out = op.rotary_embed(x if batched else x[None], cos, sin, bool(interleaved), backends.requested(backend))
    return out if batched else out.squeeze(0)


def _of_pairs(table: Tensor, interleaved: bool) -> Tensor:
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def _check_x(x: Tensor) -> None:
    if x.dim() not in (3, 4):
        raise ValueError(f"{_NAME}: x has shape {tuple(x.shape)}; it must be (T, H, D) or (B, T, H, D)")
    if x.shape[-1] % 2 or 0 in x.shape[-2:]:
        raise ValueError(
            f"{_NAME}: x has shape {tuple(x.shape)}; it needs at least one head, of an even number of numbers"
        )
    if x.stride(-1) != 1:
        raise ValueError(f"{_NAME}: x has strides {x.stride()}; the last must be 1: call x.contiguous()")


def _check_table(label: str, table: Tensor, x: Tensor) -> None:
    _checks.same_device(_NAME, label, table, "x", x)
    *batch, tokens, _, dim = x.shape
    leads = [(), (1,), *((size,) for size in batch)]
    if tuple(table.shape) not in [(*lead, tokens, width) for lead in leads for width in (dim, dim // 2)]:
        shapes = " or ".join(str((*lead, tokens, dim)) for lead in dict.fromkeys(leads))
        raise ValueError(
            f"{_NAME}: {label} has shape {tuple(table.shape)}; for x of shape {tuple(x.shape)} it must be {shapes}, or "
            f"have {dim // 2} in place of {dim}"
        )
