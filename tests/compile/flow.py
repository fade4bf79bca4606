"""Basic blocks of a function, the loops they make, and the best way round a loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from sass import Code, Instruction

JUMPS = ("BRA", "BRX", "JMP", "CALL")  # a call of a label is how ptxas leaves some loops for sm_80
ENDS = ("EXIT", "RET")


@dataclass(frozen=True)
class Loop:
    blocks: frozenset[int]
    header: int  # by which it is entered
    inner: tuple[Loop, ...]


class Flow:
    """Blocks are numbered in the order of the code; `after` and `before` say which follow each other."""

    def __init__(self, code: Code):
        instructions = code.instructions
        jumps = [i for i, x in enumerate(instructions) if x.opcode.startswith((*JUMPS, *ENDS))]
        targets = {i: targets_of(instructions[i], code) for i in jumps}
        starts = {0, *(i + 1 for i in jumps), *(target for found in targets.values() for target in found)}
        self.starts = sorted(starts - {len(instructions)})
        self.blocks = [instructions[a:b] for a, b in zip(self.starts, [*self.starts[1:], None], strict=True)]
        number = {start: block for block, start in enumerate(self.starts)}
        self.after: list[list[int]] = []
        for block, start in enumerate(self.starts):
            last = start + len(self.blocks[block]) - 1
            goes_on = conditional(instructions[last]) or not (targets.get(last) or ends(instructions[last]))
            following = [*targets.get(last, []), *[last + 1] * goes_on]
            self.after.append([number[i] for i in following if i in number])
        self.before: list[list[int]] = [[] for _ in self.starts]
        for block, following in enumerate(self.after):
            for other in following:
                self.before[other].append(block)

    def loops(self, wanted: Callable[[Instruction], bool]) -> tuple[Loop, ...]:
        """The outermost loops that hold such an instruction, and in them the inner ones that do."""
        blocks = [block for block, instructions in enumerate(self.blocks) if any(map(wanted, instructions))]
        return self._loops(blocks, frozenset(range(len(self.blocks))))

    def _loops(self, wanted: Iterable[int], within: frozenset[int]) -> tuple[Loop, ...]:
        found: list[Loop] = []
        for block in wanted:
            if block not in within or any(block in loop.blocks for loop in found):
                continue
            blocks = frozenset(reached(self.after, block, within) & reached(self.before, block, within))
            if blocks:
                header = min((b for b in blocks if not blocks.issuperset(self.before[b])), default=min(blocks))
                found.append(Loop(blocks, header, self._loops(wanted, blocks - {header})))
        return tuple(found)


def targets_of(jump: Instruction, code: Code) -> list[int]:
    """Of a branch, or of a table of them."""
    return [code.labels[label] for label in re.findall(r"\.L_\w+", jump.operands)] if not ends(jump) else []


def ends(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(ENDS)


def conditional(jump: Instruction) -> bool:
    """By its predicate or by one of its operands, which are a condition and where to go."""
    return bool(jump.predicate) or re.match(r"(?:!?U?P|~?UR)\w+,", jump.operands) is not None


def reached(step: list[list[int]], start: int, within: frozenset[int]) -> set[int]:
    """From a block on in one step and more, without leaving `within`."""
    found: set[int] = set()
    todo = [start]
    while todo:
        new = within.intersection(step[todo.pop()]) - found
        found |= new
        todo += new
    return found


Weight = tuple[float, ...]


def heaviest_way(flow: Flow, loop: Loop, weights: dict[int, Weight]) -> list[int]:
    """Round the loop from its header, by blocks that have a weight, with the largest sum of them; none, if these don't
    lead round. An inner loop is passed as one block, its header."""
    if loop.header not in weights:
        return []
    after = steps(flow, loop, weights)
    rest = {END: (0.0,) * len(weights[loop.header])}  # of the way from a block on
    next_of: dict[int, int] = {}
    # Depth first: what follows a block is settled before it, but for what was passed on the way to it, where a loop
    # that does not multiply, such as one that waits, leads back.
    opened, todo = {END}, [loop.header]
    while todo:
        block = todo[-1]
        if block not in opened:
            opened.add(block)
            todo += after[block] - opened
            continue
        todo.pop()
        onward = [other for other in after[block] if other in rest]
        if onward and block not in rest:
            next_of[block] = max(onward, key=lambda other: (rest[other], -other))
            rest[block] = tuple(a + b for a, b in zip(weights[block], rest[next_of[block]], strict=True))
    way = [loop.header]
    while next_of.get(way[-1], END) != END:
        way.append(next_of[way[-1]])
    return way if loop.header in rest else []


END = -1  # of a way round: where it would come to the header again


def steps(flow: Flow, loop: Loop, allowed: Container[int]) -> dict[int, set[int]]:
    """From each block of the loop, or from an inner loop as a whole, to the next ones that are allowed."""
    stands_for = {block: inner.header for inner in loop.inner for block in inner.blocks} | {loop.header: END}
    found: dict[int, set[int]] = {}
    for block in loop.blocks:
        node = stands_for.get(block, block) if block != loop.header else block
        following = {stands_for.get(other, other) for other in flow.after[block] if other in loop.blocks}
        found.setdefault(node, set()).update(x for x in following if x == END or (x in allowed and x != node))
    return found
