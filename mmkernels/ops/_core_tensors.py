"""Handing tensors to the compiled core: addresses, sizes and strides, nothing copied."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .. import _core
from ._checks import in_words

FLOATS = {
    torch.float32: _core.DType.float32,
    torch.bfloat16: _core.DType.bfloat16,
    torch.float16: _core.DType.float16,
}


def matrix(x: Tensor) -> _core.Matrix:
    """A (rows, columns) tensor of any strides. It must outlive the call that the matrix is passed to."""
    return _core.Matrix(x.data_ptr(), FLOATS[x.dtype], *x.shape, *x.stride())


def heads_of(x: Tensor) -> _core.Heads:
    """A (B, T, H, D) tensor with a unit last stride. It must outlive the call that this is passed to."""
    return _core.Heads(x.data_ptr(), FLOATS[x.dtype], *x.shape, *x.stride()[:3])


def unsupported_tensor(name: str, x: Tensor, dtypes: Collection[torch.dtype] = tuple(FLOATS)) -> str | None:
    """Why the core cannot read the tensor `x`; None when it can."""
    if x.device.type != "cpu":
        return f"it serves tensors on the CPU, {name} is on {x.device}"
    if x.dtype not in dtypes:
        return f"it serves {name} of {in_words(dtypes)}, not {x.dtype}"
    return None
