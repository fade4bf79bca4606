"""What the loops of tensor-core kernels cost, read from machine code: how a change is measured where there is no GPU.

    python tests/compile/loops.py FILE... [--kernel RE]     # cubins, or a module that holds some (mmkernels/_cuda*.so)

Of every inner loop that multiplies the table has one way round, or two:

  plain   of those that multiply most the cheapest: no mask, no softcap, no waiting, no NaN
  masked  of those the one that selects most, as at both ends of a span

and of each the cycles that it keeps a pipe busy (cycles.py). `bound` is the busiest pipe's over the tensor cores': 1.00
says that nothing else limits the loop, if all overlaps; 1.25 that the tensor cores idle a fifth of the time at least.
An outer loop is a plain round of its own with as many of the loops inside as give the tensor cores 4096, 6144 or 8192
cycles: for the losses of sm_90a features of 512, 768, 1024; for its attention 1024 keys of heads of 64, 96, 128.

`order` and `hidden` are explained in events.py.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cycles import PIPES, cycles_of, multiplies
from events import Events
from flow import Flow, Loop, heaviest_way
from rich import box
from rich.console import Console
from rich.table import Table
from sass import Code, Instruction, Kernel, kernels_of, kernels_of_module

TILES = (4096, 6144, 8192)
MASK = 8  # selects that a way has beyond the plain one, at least, if it masks
SOFTCAP = ("MUFU.TANH", "MUFU.RCP")
LOCAL_MEMORY = ("LDL", "STL")


@dataclass(frozen=True)
class Way:
    """A way round a loop, and what it costs."""

    name: str  # "plain", "masked" or "outer 4096"; from a kernel's second inner loop on with its number, "plain 2"
    address: str
    cycles: dict[str, float]  # by pipe
    events: Events
    spills: bool

    @property
    def busiest(self) -> str:
        return max(PIPES, key=lambda pipe: self.cycles[pipe])

    @property
    def bound(self) -> float:
        return self.cycles[self.busiest] / self.cycles["tensor"]

    @property
    def issue(self) -> float:
        return self.cycles["issue"] / self.cycles["tensor"]


def ways_of(kernel: Kernel) -> list[Way]:
    """Round the loops of a kernel that multiply, inner ones first."""
    survey = Survey(Flow(Code.of(kernel.text)), kernel.architecture)
    return [way for loop in survey.flow.loops(lambda x: multiplies(x.opcode)) for way in survey.ways(loop)]


class Round:
    """Once along some instructions, and once round each of some loops."""

    def __init__(self, instructions: Sequence[Instruction], inside: Sequence[Round], architecture: str):
        self.instructions = instructions
        self.own: dict[str, float] = added(cycles_of(x, architecture) for x in instructions)
        self.inside: dict[str, float] = added(cycles for each in inside for cycles in (each.own, each.inside))
        self.selects = sum(x.opcode.startswith("FSEL") for x in instructions)

    @property
    def tensor(self) -> float:
        return self.own["tensor"] + self.inside["tensor"]

    def weight(self, masked: bool) -> tuple[float, ...]:
        """By which one way is taken instead of another."""
        return (self.tensor, masked * self.selects, -self.own["issue"] - self.inside["issue"])

    def filled(self, tile: int) -> dict[str, float]:
        """The cycles with as many rounds inside as keep the tensor cores busy so long."""
        rounds = (tile - self.own["tensor"]) / self.inside["tensor"] if self.inside["tensor"] else 0
        return {pipe: self.own[pipe] + max(rounds, 0) * self.inside[pipe] for pipe in PIPES}


def added(each: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total = dict.fromkeys(PIPES, 0.0)
    for cycles in each:
        for pipe, number in cycles.items():
            total[pipe] += number
    return total


class Survey:
    """Of a kernel's loops."""

    def __init__(self, flow: Flow, architecture: str):
        self.flow, self.architecture = flow, architecture
        self.innermost = 0  # loops, of those found
        self.known: dict[int, Round] = {}  # along a block, or round an inner loop, which its header stands for

    def ways(self, loop: Loop) -> list[Way]:
        found = [way for inner in loop.inner for way in self.ways(inner)]
        plain = self.known[loop.header] = self.round(loop, masked=False)
        if loop.inner:
            return [*found, *(self.way(f"outer {tile}", loop, plain, plain.filled(tile)) for tile in TILES)]
        self.innermost += 1
        number = f" {self.innermost}" if self.innermost > 1 else ""
        masked = self.round(loop, masked=True)
        rounds = {"plain": plain} | ({"masked": masked} if masked.selects >= plain.selects + MASK else {})
        return [self.way(name + number, loop, each, each.own) for name, each in rounds.items()]

    def way(self, name: str, loop: Loop, taken: Round, cycles: dict[str, float]) -> Way:
        spills = any(x.opcode.startswith(LOCAL_MEMORY) for x in taken.instructions)
        return Way(name, self.flow.blocks[loop.header][0].address, cycles, Events.of(taken.instructions), spills)

    def round(self, loop: Loop, masked: bool) -> Round:
        every = self.best(loop, masked, loop.blocks)
        if loop.inner:
            return every
        # Softcap's blocks are left out where the products can do without; losses take reciprocals in outer loops alone.
        rest = self.best(loop, masked, {block for block in loop.blocks if not has_softcap(self.flow.blocks[block])})
        return rest if rest.tensor >= every.tensor else every

    def best(self, loop: Loop, masked: bool, blocks: Collection[int]) -> Round:
        way = heaviest_way(self.flow, loop, {block: self.along(block).weight(masked) for block in blocks})
        inner = {each.header for each in loop.inner}
        own = [instruction for block in way if block not in inner for instruction in self.flow.blocks[block]]
        return Round(own, [self.known[block] for block in way if block in inner], self.architecture)

    def along(self, block: int) -> Round:
        if block not in self.known:
            self.known[block] = Round(self.flow.blocks[block], (), self.architecture)
        return self.known[block]


def has_softcap(instructions: Iterable[Instruction]) -> bool:
    return any(x.opcode.startswith(SOFTCAP) for x in instructions)


def kernels_in(file: Path) -> list[Kernel]:
    if file.suffix == ".cubin":
        return kernels_of(file)
    with tempfile.TemporaryDirectory() as folder:
        return kernels_of_module(file, Path(folder))


def table_of(ways: Iterable[Way]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", min_width=12)
    for name in (*PIPES, "issue/tensor", "bound"):
        table.add_column(name, justify="right", min_width=6)
    for name in ("by", "hidden", "order"):
        table.add_column(name, min_width=8)
    for way in ways:
        figures = [*(f"{way.cycles[pipe]:.0f}" for pipe in PIPES), f"{way.issue:.2f}", f"{way.bound:.2f}"]
        hidden = f"{way.events.hidden} of {way.events.exponentials}"
        faults = ["SERIALISED"] * way.events.serialised + ["SPILLS"] * way.spills
        table.add_row(way.name, *figures, way.busiest, hidden, " ".join([*faults, way.events.order]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--kernel", default="", metavar="RE", help="of kernels whose name this expression finds")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    for kernel in (kernel for file in arguments.files for kernel in kernels_in(file)):
        if re.search(arguments.kernel, str(kernel)) and (ways := ways_of(kernel)):
            console.print(str(kernel), style="bold", markup=False, highlight=False)
            console.print(table_of(ways))


if __name__ == "__main__":
    main()
