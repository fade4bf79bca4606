"""Memory that betrays whoever uses it unasked.

`poisoned` fills what torch allocates without initialising (outputs, workspaces) with NaN, so that an element no kernel
wrote shows up. `guarded` puts a tensor into a larger buffer of NaN, in the layout asked for, so that an element read
past the edge, or between the rows of a strided view, shows up too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MEMORY = ("plain", "odd", "columns", "strided", "expanded", "channels_last", "crop", "far", "fused", "heads_first")
GUARD = 64  # elements before and after; a multiple of every vector width, so that "plain" stays aligned


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty and its kin return NaN (the largest value, for integers) inside the block."""
    was_on, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        probe = torch.empty(8)
        if not all(x.isnan().all() for x in (probe, torch.empty_like(probe), probe.new_empty(3))):
            raise RuntimeError("this torch does not fill uninitialised memory: the check would miss unwritten outputs")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was_filling
        torch.use_deterministic_algorithms(was_on, warn_only=warned)


def guarded(values: Tensor, memory: str = "plain") -> Tensor:
    """`values` again, laid out as `memory` says inside a buffer of NaN (255 for uint8):

    plain            contiguous and aligned           odd        contiguous from an odd address
    columns          the last two axes swapped        strided    every 2nd row and 3rd column of something larger
    expanded         the first row again and again    crop       a window of a larger picture
    channels_last    as torch.channels_last           far        first axis spread beyond 2^31 elements
    fused            (.., T, H, D) as one third       heads_first (.., T, H, D) in the order (.., H, T, D)
                     of a fused projection
    """
    strides = _strides(values, memory)
    extent = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
    lead = GUARD - 3 if memory == "odd" else GUARD
    total = lead + extent + GUARD
    if memory == "far":  # gigabytes of which a few pages are ever touched
        buffer = torch.empty(total, dtype=values.dtype, device=values.device)
    else:
        buffer = torch.full((total,), math.nan if values.is_floating_point() else 255, device=values.device)
        buffer = buffer.to(values.dtype)
    view = buffer.as_strided(values.shape, strides, lead)
    if memory == "expanded":
        view[0].copy_(values[0])
    else:
        view.copy_(values)
    return view


def _strides(values: Tensor, memory: str) -> tuple[int, ...]:
    shape = values.shape
    if memory == "columns":
        return values.mT.contiguous().mT.stride() if values.dim() > 1 else values.stride()
    if memory == "strided":
        return _row_major((*shape[:-2], 2 * shape[-2], 3 * shape[-1]), steps=(2, 3))
    if memory == "crop":
        return _row_major((*shape[:-2], shape[-2] + 5, shape[-1] + 9))
    if memory == "expanded":
        return (0, *_row_major(shape)[1:])
    if memory == "channels_last":
        kind = torch.channels_last if values.dim() == 4 else torch.channels_last_3d
        return values.to(memory_format=kind).stride()
    if memory == "fused":
        return _row_major((*shape[:-2], 3 * shape[-2], shape[-1]))
    if memory == "heads_first":
        return values.transpose(-3, -2).contiguous().transpose(-3, -2).stride()
    if memory == "far":
        inner = _row_major(shape)
        return (2**31 // max(1, shape[0] - 1) + inner[0], *inner[1:])
    return _row_major(shape)


def _row_major(shape: tuple[int, ...], steps: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Strides of a contiguous tensor of that shape, the last axes' multiplied by `steps`."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for axis, step in zip(range(-len(steps), 0), steps, strict=True):
        strides[axis] *= step
    return tuple(strides)
