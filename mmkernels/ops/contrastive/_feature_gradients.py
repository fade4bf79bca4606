"""dI and dT from dS, which a kernel writes for a chunk of rows at a time, by the vendor's products: what the backends
for a GPU share. Imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .pairing import Pairing

DS_SCALE = 2.0**15  # |count dS| <= 1: without it float16 would lose the small probabilities


def feature_gradients(
    write_rows: Callable[[Tensor, int], None],
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    count: float | Tensor,
    width: int,
    chunks: Iterable[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Float32 gradients of both features, `width` columns of them, by a chunk of rows of dS, (first, count), at
    a time.

    write_rows(ds, row0) fills count dS times DS_SCALE from row0 on; rows of ds are 16-byte aligned, and have room for
    columns up to a multiple of 8.
    """
    m = len(text)
    pitch = -(-m // 8) * 8
    factor = scale.detach().float().reshape(()) / (count * DS_SCALE)
    d_image, d_text = (x.new_empty(len(x), width, dtype=torch.float32) for x in (image, text))
    d_text_sum = None
    for row0, rows in chunks:
        ds = image.new_empty(rows, pitch)[:, :m]
        write_rows(ds, row0)
        torch.mul(_product(ds, text)[:, :width], factor, out=d_image[row0 : row0 + rows])
        part = _product(ds.T, image[row0 : row0 + rows])
        d_text_sum = part if d_text_sum is None else d_text_sum.add_(part)
    torch.mul(d_text_sum[:, :width], factor, out=d_text)
    return d_image, d_text


def own_slopes(pairing: Pairing, rows: Tensor, columns: Tensor) -> Tensor:
    """(N,) count dS of own pairs by the weights of images and texts, 0 of images without one."""
    own = torch.zeros_like(rows[3])
    own[pairing.own_images] = -(rows[3, pairing.own_images] + columns[3, pairing.own_texts])
    return own


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b summed in, and returned as, float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(a, b, out_dtype=torch.float32)
    # torch before 2.8, ROCm and the CPU have no product of half types with a float32 result
    return a.float() @ b.float()
