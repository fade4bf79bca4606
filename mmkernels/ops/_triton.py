"""What the Triton backends share: device helpers that run compiled and interpreted, and the launch.

Strides reach a kernel in units of 8 elements and are multiplied back there. The compiler knows of an argument only
whether 16 divides it; a multiplication by 8 that it can see is what proves every row to start at a 16 byte boundary,
and without that proof the copies are no longer asynchronous and the software pipeline is silently gone. Rows that do
not start there are copied once (`_aligned_rows.py`): O(N D) bytes beside a kernel that does far more work than that.

No integer argument is specialised on its value, so one compiled kernel serves every batch.
"""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import in_words
from ._precision import tf32_is_allowed

# A module-level constexpr: part of the cache key, and the branches on it fold away when compiled.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """A tile configuration: fixed and tabulated by architecture, so that the first call tunes nothing."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers a thread, where fewer let a second block share the multiprocessor

    def meta(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def unsupported_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why the kernels cannot take this tensor."""
    if tensor.dtype not in dtypes:
        return f"{name} has dtype {tensor.dtype}; the Triton kernels take {in_words(dtypes)}"
    if tensor.device.type != "cuda" and not INTERPRET.value:
        return f"{name} is on {tensor.device}; the Triton kernels run on a GPU, or interpreted with TRITON_INTERPRET=1"
    return None


@functools.cache
def family(device: torch.device) -> str:
    """The row of the tile tables that serves a device."""
    if INTERPRET.value:
        return "interpreter"
    if torch.version.hip is not None:
        return "cdna"
    major, _ = torch.cuda.get_device_capability(device)
    # Consumer Blackwell (12.x) has neither wgmma nor tcgen05, and 99 KiB of shared memory: it is served like Ampere.
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: exactly, unless the user allows TF32 for matrix products."""
    return "tf32" if dtype == torch.float32 and tf32_is_allowed() and torch.version.hip is None else "ieee"


def launch(kernel, programs: int, *args, **meta) -> None:
    """Run a kernel over a one-dimensional grid, on the device of its first argument."""
    if programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **meta)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. The interpreter keeps bfloat16 as raw bits and would multiply those."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in dtype, to nearest even. The interpreter would truncate to bfloat16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


STRIPS = tl.constexpr(4)


@triton.jit
def strips_of(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The STRIPS strips [BLOCK_M, BLOCK_N / STRIPS] of a tile, left to right.

    What follows a product is done strip by strip: a strip is a renaming of registers, and a quarter as many of the
    temporaries are live. Whole tiles spill registers, or leave a multiprocessor to one block.
    """
    left, right = _halves(x, BLOCK_M, BLOCK_N)
    strip0, strip1 = _halves(left, BLOCK_M, BLOCK_N // 2)
    strip2, strip3 = _halves(right, BLOCK_M, BLOCK_N // 2)
    return strip0, strip1, strip2, strip3


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return x.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def grouped_tile(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of this program's tile: GROUP_M rows of tiles go column by column, so that operands stay in L2."""
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return group * GROUP_M + within % rows, within // rows


@triton.jit
def log1p_unit(x):
    """log(1 + x) on [0, 1], relative error 1.5e-7: x (1 + x q(x)), q minimax of degree 7.

    tl.log becomes a long sequence; on a 128 x 128 tile that tripled the code and spilled registers.
    """
    q = 0.005364824552088976
    q = q * x - 0.03006579354405403
    q = q * x + 0.07920453697443008
    q = q * x - 0.13753803074359894
    q = q * x + 0.191536545753479
    q = q * x - 0.24857163429260254
    q = q * x + 0.3332132399082184
    q = q * x - 0.49999648332595825
    return x + x * x * q
