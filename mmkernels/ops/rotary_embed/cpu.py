"""Rotary embedding by the compiled core: addresses, sizes and strides out, nothing copied."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _core
from .._core_tensors import heads_of, unsupported_tensor


def unsupported(x: Tensor) -> str | None:
    return unsupported_tensor("x", x)


def rotary_embed(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _core.rotary_embed(
        x=heads_of(x),
        out=heads_of(out),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        table_stride=cos.stride(0) if len(cos) > 1 else 0,
        interleaved=interleaved,
        transposed=transposed,
    )
    return out
