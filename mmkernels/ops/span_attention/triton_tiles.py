"""Tile configurations of the Triton kernels of span attention, and how head sizes are cut.

For half types none spills a register, but for a few with softcap, and all fit into shared memory (tests/compile).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .._triton import Tile

FEW_ROWS = 16  # the fewest that tensor cores multiply: a block of queries for decoding


@dataclass(frozen=True)
class Width:
    """A head of `numbers`, in memory `padded` to a multiple of 8, in the kernels the powers of two W0 + W1."""

    numbers: int

    @property
    def padded(self) -> int:
        return -(-self.numbers // 8) * 8

    @property
    def parts(self) -> tuple[int, int]:
        whole = max(triton.next_power_of_2(self.padded), 16)
        first = whole // 2
        rest = max(triton.next_power_of_2(self.padded - first), 16 if first < 256 else 64)  # thinner ones spill there
        return (whole, 0) if first < 16 or first + rest >= whole else (first, rest)

    @property
    def columns(self) -> tuple[int, int, int]:
        return self.padded, *self.parts


# By kernel and architecture: heads of up to 64, 96, 128, 256, 512 and 576 numbers. Float32's end at 256.
Tiles = tuple[Tile, ...]
HEADS = (64, 96, 128, 256, 512, 576)
LARGEST_HEAD, LARGEST_BLOCK = HEADS[-1], 128


def _same(*tile) -> Tiles:
    return (Tile(tile[0], tile[1], None, *tile[2:]),) * len(HEADS)


def _each(*tiles) -> Tiles:
    return tuple(Tile(m, n, None, *rest) for m, n, *rest in tiles)


# Of heads above 256, sums of 64 rows, the fewest that wgmma and tcgen05 multiply, spill wherever they are not in the
# table: 32 rows are left to sm80's instructions. Of those above 512, 16 rows at a time fit into sm80's shared memory.
TILES: dict[str, dict[str, Tiles]] = {
    "interpreter": {
        "forward": _same(32, 32, 4, 1),
        "few_rows": _same(FEW_ROWS, 32, 4, 1),
        "query_grad": _same(32, 32, 4, 1),
        "key_grads": _same(32, 32, 4, 1),
    },
    "sm80": {
        "forward": _each((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2), *[(32, 16, 8, 2)] * 2),
        "few_rows": _each(*[(16, 64, 4, 3)] * 3, (16, 32, 4, 2), *[(16, 16, 4, 2)] * 2),
        "query_grad": _each(
            (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2)
        ),
        "key_grads": _each(
            (32, 128, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 4, 2)
        ),
    },
    "sm90": {
        "forward": _each((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 8, 2), *[(32, 32, 8, 3)] * 2),
        "few_rows": _each(*[(16, 64, 4, 3)] * 3, (16, 32, 4, 3), *[(16, 16, 4, 3)] * 2),
        "query_grad": _each(*[(128, 64, 8, 2)] * 3, (64, 32, 8, 2), *[(32, 32, 8, 2)] * 2),
        "key_grads": _each((64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2), *[(32, 32, 8, 2)] * 2),
    },
    "sm100": {
        "forward": _each(*[(128, 128, 8, 2)] * 3, (64, 64, 8, 2), (64, 16, 8, 2), (32, 32, 8, 2)),
        "few_rows": _each(*[(16, 64, 4, 3)] * 3, (16, 32, 4, 3), *[(16, 16, 4, 2)] * 2),
        "query_grad": _each(
            (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)
        ),
        "key_grads": _each(*[(64, 128, 8, 2)] * 3, (32, 128, 8, 2), *[(32, 32, 8, 2)] * 2),
    },
    "cdna": {
        "forward": _each(*[(128, 64, 4, 2)] * 3, (64, 32, 4, 2), *[(32, 16, 4, 2)] * 2),
        "few_rows": _each(*[(16, 64, 4, 2)] * 3, (16, 32, 4, 2), *[(16, 16, 4, 2)] * 2),
        "query_grad": _each(*[(64, 32, 4, 1)] * 4, *[(32, 16, 4, 1)] * 2),
        "key_grads": _each(*[(32, 64, 4, 1)] * 3, (32, 32, 4, 1), *[(16, 32, 4, 1)] * 2),
    },
}
# Float32, exact, is multiplied without tensor cores, from registers: small tiles, and many warps. Of heads above 256 no
# tile fits into shared memory.
FLOAT32: dict[str, Tiles] = {
    "forward": _each((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    "few_rows": _each((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    "query_grad": _each((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
    "key_grads": _each((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
}


def _tiles(family: str, dtype: torch.dtype) -> dict[str, Tiles]:
    return FLOAT32 if dtype == torch.float32 and family != "interpreter" else TILES[family]


def largest_head(family: str, dtype: torch.dtype) -> int:
    return HEADS[len(_tiles(family, dtype)["forward"]) - 1]


def tile_of(kernel: str, family: str, dtype: torch.dtype, *widths: Width) -> Tile:
    numbers = max(sum(width.parts) for width in widths)
    return _tiles(family, dtype)[kernel][next(index for index, limit in enumerate(HEADS) if numbers <= limit)]


def gradient_passes(*widths: Width) -> tuple[tuple[bool, bool], ...]:
    """The launches that make dK and dV, and which of them each makes: both sums of wide heads are too many registers,
    and computing the scores twice costs less than spilling them."""
    wide = max(sum(width.parts) for width in widths) > 128
    return ((True, False), (False, True)) if wide else ((True, True),)
