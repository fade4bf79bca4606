"""What an instruction of a kernel keeps busy, and for how long.

In cycles of a quarter of a multiprocessor, which issues one instruction a cycle, while one warp goes by: with wgmma one
warp of a warpgroup. Warps share every pipe alike, so that the ratio of two pipes is that of the whole multiprocessor.

  tensor  wgmma of 64 x n x 32 bytes n / 2, which is 4096 FLOP a cycle and multiprocessor of 16 bit numbers. mma.sync of
          16 x 8 x 32 bytes 8, sm_80's rate: what later GPUs make of it is not published, and one measure for all
          of them lets their figures be compared
  issue   every instruction 1
  fma     FFMA and its like 1, on sm_80 2; IMAD 2
  alu     compare, select, min, max, logic, shift, integer addition, packing of two numbers: 2
  mufu    exponential, reciprocal and others, and conversions between kinds of numbers: 8
  shared  128 bytes of shared memory a cycle and multiprocessor: the operands of wgmma, LDS, STS, LDSM, STSM by their
          width. An upper bound of loads that broadcast; what asynchronous copies write or read is not in it. A shuffle
          takes as long as a load of 4 bytes
"""

from __future__ import annotations

import re
from functools import cache

from sass import Instruction

PIPES = ("tensor", "issue", "fma", "alu", "mufu", "shared")

QUARTERS = 4  # whose warps come to the one shared memory
FMA = "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HMUL2 HADD2 HSETP2"
ALU = "FMNMX FMNMX3 FSEL FSETP FCHK SEL ISETP PLOP3 LOP3 SHF IADD IADD3 VIADD IMNMX VIMNMX VIMNMX3 VIADDMNMX LEA PRMT"
ALU += " MOV F2FP I2FP IABS SGXT BMSK P2R R2P CS2R"
MUFU = "MUFU F2I I2F F2F FRND"
BUSY = {
    name: (pipe, cycles)
    for names, pipe, cycles in (
        (FMA, "fma", 1),
        ("IMAD", "fma", 2),
        (ALU, "alu", 2),
        (MUFU, "mufu", 8),
        ("SHFL", "shared", QUARTERS),
    )
    for name in names.split()
}


def multiplies(opcode: str) -> bool:
    """On tensor cores."""
    return opcode.startswith(("HGMMA.", "HMMA."))


def left_in_registers(instruction: Instruction) -> bool:
    """Of a wgmma the operand that else is read from shared memory."""
    if not instruction.opcode.startswith("HGMMA."):
        return False
    return re.match(r"R\d+, R\d+, gdesc", instruction.operands) is not None


def cycles_of(instruction: Instruction, architecture: str) -> dict[str, float]:
    """By pipe, of those that the instruction needs."""
    return _cycles(instruction.opcode, left_in_registers(instruction), architecture)


@cache
def _cycles(opcode: str, left_in_registers: bool, architecture: str) -> dict[str, float]:
    name, *modifiers = opcode.split(".")
    if name == "HGMMA":
        columns = int(modifiers[0].split("x")[1])
        rows = columns if left_in_registers else columns + 64
        return {"issue": 1, "tensor": columns / 2, "shared": rows * 32 / 128}
    if name == "HMMA":
        depth, size = int(modifiers[0].removeprefix("168")), 4 if "TF32" in modifiers else 2
        return {"issue": 1, "tensor": depth * size / 32 * 8}
    if name in ("LDS", "STS", "LDSM", "STSM"):
        return {"issue": 1, "shared": QUARTERS * words_of_a_lane(modifiers)}
    pipe, cycles = BUSY.get(name, ("issue", 1))
    return {"issue": 1, pipe: 2 if pipe == "fma" and architecture == "sm_80" else cycles}


def words_of_a_lane(modifiers: list[str]) -> int:
    """Of loads and stores of shared memory. A part of a word takes as long as one."""
    if {"M88", "MT88"} & set(modifiers):
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1  # matrices of 8 x 8
    return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
