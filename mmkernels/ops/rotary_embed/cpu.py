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
    table_stride = cos.stride(0) if len(cos) > 1 else 0
    tables = cos.data_ptr(), sin.data_ptr(), table_stride
    _core.rotary_embed(heads_of(x), heads_of(out), *tables, interleaved, transposed)
    return out
