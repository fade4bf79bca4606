"""In what order a warp multiplies, waits and takes exponentials, and what that hides."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from cycles import multiplies
from sass import Instruction


@dataclass(frozen=True)
class Events:
    """Of instructions that are gone through again and again.

    H is a product, ! the end of a group of wgmma's, wN a wait until N groups are left, e an exponential or its like, b
    a barrier. Hidden are those e that are issued while a product of the same warp is under way.
    """

    order: str
    hidden: int
    exponentials: int
    serialised: bool  # ptxas, short of registers or in doubt about an accumulator, waits for each product by itself

    @classmethod
    def of(cls, instructions: Iterable[Instruction]) -> Events:
        marks = [mark for mark in map(mark_of, instructions) if mark]
        _, under_way = hidden_of(marks, 0)
        hidden, _ = hidden_of(marks, under_way)  # the second time round
        order = "".join(marks)
        alone, products = len(re.findall("(?<!H)H!w0", order)), order.count("H")
        order = re.sub(r"(H|e|b)\1+", lambda found: f"{found[1]}{len(found[0])}", order)
        order = re.sub(r"(H!w0)\1+", lambda found: f"({found[1]}){len(found[0]) // len(found[1])}", order)
        return cls(order, hidden, marks.count("e"), 2 * alone > products)


def mark_of(instruction: Instruction) -> str:
    opcode, operands = instruction.opcode, instruction.operands
    if multiplies(opcode):
        return "H!" if "gsb0" in operands else "H"
    if opcode.startswith("WARPGROUP.DEPBAR"):
        return f"w{int(operands.split(',')[1], 16)}"
    return "e" if opcode.startswith("MUFU") else "b" if opcode.startswith("BAR") else ""


def hidden_of(marks: Iterable[str], groups: int) -> tuple[int, int]:
    """Exponentials during products, with so many groups under way at the beginning; and how many are at the end."""
    hidden = 0
    for mark in marks:
        if mark == "H!":
            groups += 1
        elif mark.startswith("w"):
            groups = min(groups, int(mark[1:]))
        hidden += mark == "e" and groups > 0
    return hidden, groups
