"""Cubins as instructions, by the disassembler that comes with the triton wheel."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/ +(?:@(?P<predicate>\S+) +)?(?P<opcode>[A-Z][\w.]*) *(?P<operands>[^;\n]*);"
    r"|^(?P<label>\.L_\w+):",
    re.M,
)
OPCODE = re.compile(r"\*/ +(?:@\S+ +)?([A-Z][\w.]*)")


class Instruction(NamedTuple):
    address: str  # hexadecimal, as the disassembler has it
    predicate: str
    opcode: str  # with what follows its dots
    operands: str


@dataclass(frozen=True)
class Code:
    """A function's instructions in their order, and before which of them each label stands."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Code:
        code = cls()
        for *instruction, label in INSTRUCTION.findall(text):
            if label:
                code.labels[label] = len(code.instructions)
            else:
                code.instructions.append(Instruction._make(instruction))
        return code


@dataclass(frozen=True)
class Kernel:
    """Machine code of one kernel for one architecture. A module has more than a million instructions, so that what is
    kept is the text."""

    architecture: str
    name: str
    registers: int
    stack: int
    text: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.short_name} for {self.architecture}"

    @property
    def short_name(self) -> str:
        """Without namespaces, the type of the result and the parameters, which say nothing more."""
        bare = re.sub(r"(?:\w+|\(anonymous namespace\))::", "", self.name).removeprefix("void ").replace("> >", ">>")
        return re.sub(r"^(\w+(?:<.*>)?)\(.*", r"\1", bare)

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(OPCODE.findall(self.text))

    def count(self, pattern: str) -> int:
        """Of the instructions whose opcode begins so."""
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))


def run(tool: str, *arguments: str, cwd: Path | None = None) -> str:
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None, f"{tool} comes with the triton wheel, which is not here"
    path = Path(triton.origin).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


def kernels_of_module(module: Path, folder: Path) -> list[Kernel]:
    """Of a shared object with cubins in it, which are left in the folder."""
    run("cuobjdump", "-xelf", "all", str(module.resolve()), cwd=folder)
    with ThreadPoolExecutor(2) as pool:
        return [kernel for found in pool.map(kernels_of, sorted(folder.glob("*.cubin"))) for kernel in found]


def kernels_of(cubin: Path) -> list[Kernel]:
    usage = dict(re.findall(r"Function (\S+):\n\s*(.+)", run("cuobjdump", "-res-usage", str(cubin))))
    demangled = subprocess.run("c++filt", input="\n".join(usage), capture_output=True, text=True, check=True).stdout
    head, *functions = run("nvdisasm", "-c", str(cubin)).split("\n.text.")
    text = dict(function.split(":\n", 1) for function in functions)
    assert set(usage) == set(text)
    return [
        Kernel(architecture_of(head), name, number("REG", usage[symbol]), number("STACK", usage[symbol]), text[symbol])
        for symbol, name in zip(usage, demangled.splitlines(), strict=True)
    ]


def number(word: str, usage: str) -> int:
    return int(re.findall(rf"\b{word}:(\d+)", usage)[0])


def architecture_of(head: str) -> str:
    """As ptxas names it, or by the flags of an older format of cubins, in which Triton's are."""
    if named := re.search(r"\.target\s+(sm_\w+)", head):
        return named[1]
    specific = "a" if "EF_CUDA_ACCELERATORS" in head else ""
    return f"sm_{re.findall(r'EF_CUDA_SM([0-9]+)', head)[0]}{specific}"
