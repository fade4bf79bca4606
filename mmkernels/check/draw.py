"""Where the numbers of a case come from."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAWS = 4  # independent draws a case; results of few elements need them (see mmkernels.check.budget)


class Draw:
    """Random numbers of one draw, the same on every device."""

    def __init__(self, *key: object):
        self._generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self._generator, dtype=torch.uint8)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64, from low to high - 1."""
        return torch.randint(low, high, shape, generator=self._generator)

    def factor(self) -> Tensor:
        """A number that every dtype holds exactly, of either sign: what a loss's gradient is fed with."""
        return torch.randint(2, 16, (), generator=self._generator).double() / 4 * (-1) ** self.coin()

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)

    def coin(self) -> int:
        return int(torch.randint(0, 2, (), generator=self._generator))
