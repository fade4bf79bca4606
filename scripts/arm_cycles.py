"""How near the peak the inner products for ARM come by llvm-mca's models of some processors: a row of the table in
docs/cpu.md for each. Nothing runs; loads count as hits in the L1 cache.

    apt-get install g++-aarch64-linux-gnu llvm-19
    python scripts/arm_cycles.py
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
# By LLVM's models: multiply-adds that start in a cycle, of four floats or of four pairs of bfloat16, and whether it has
# the latter. LLVM 19 takes an M1 for a Cyclone, which has a pipe less.
PROCESSORS = {
    "neoverse-n1": (2, False),
    "neoverse-v1": (4, True),
    "neoverse-v2": (4, True),
    "apple-m1": (3, False),
}
SOURCE = """
#include "cpu/product/matmul.h"
namespace mmk::MMK_ISA {
#define PRODUCT(name, operand, row, unit)                                                         \\
    void name(const uint32_t* a, int64_t apart, const uint32_t* b, int64_t units, float* c) {     \\
        multiply_into<operand, kTileRows, kTileVectors>({a, row, unit}, b, kTileColumns, units, c, \\
                                                        kTileColumns, false);                     \\
    }
PRODUCT(rows_float32, FloatOperand, apart, 1)
PRODUCT(columns_float32, FloatOperand, 1, apart)
PRODUCT(rows_bfloat16, BFloat16Operand, apart, 1)
PRODUCT(columns_bfloat16, BFloat16Operand, 1, apart)
}
"""


def assembly() -> str:
    command = ["aarch64-linux-gnu-g++", "-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=fast", "-Wno-psabi"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "products.cpp")
        source.write_text(SOURCE)
        command += ["-DMMK_NEON", "-DMMK_ISA=neon_bf16", "-march=armv8.2-a+bf16", f"-I{CSRC}"]
        command += ["-S", "-o", "-", str(source)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def innermost_loop(function: str) -> list[str]:
    """The instructions between a label and the branch back to it that multiply most, no other label among them."""
    lines, found = function.splitlines(), []
    labels = {line[:-1]: number for number, line in enumerate(lines) if re.match(r"\.L\d+:", line)}
    for end, line in enumerate(lines):
        branch = re.match(r"\tb\.?\w+\t(\.L\d+)$", line)
        start = labels.get(branch[1], end) if branch else end
        inside = lines[start + 1 : end + 1]
        if inside and not any(each.startswith(".L") for each in inside):
            found.append([each for each in inside if not each.startswith("\t.")])
    return max(found, key=multiply_adds)


def multiply_adds(code: list[str]) -> int:
    return sum(bool(re.match(r"\t(fmla|bfdot)\t", line)) for line in code)


def cycles(code: list[str], processor: str, rounds: int = 200) -> float:
    command = ["llvm-mca-19", "-mtriple=aarch64-linux-gnu", f"-mcpu={processor}", "-mattr=+bf16"]
    command += [f"-iterations={rounds}", "-"]
    said = subprocess.run(command, input="\n".join(code) + "\n", check=True, capture_output=True, text=True).stdout
    return int(re.search(r"Total Cycles:\s+(\d+)", said)[1]) / rounds


def main() -> None:
    print("| product | " + " | ".join(PROCESSORS) + " |\n|---|" + "---|" * len(PROCESSORS))
    for name, body in re.findall(r"^_ZN3mmk9neon_bf16\d+(\w+?)EP\w+:\n(.*?)^\t\.size", assembly(), re.S | re.M):
        code, cells = innermost_loop(body), []
        for processor, (pipes, has_bfloat16) in PROCESSORS.items():
            share = multiply_adds(code) / cycles(code, processor) / pipes
            cells.append(f"{share:.0%}" if has_bfloat16 or "bfloat16" not in name else "none")
        print(f"| {name.replace('_', ', ')} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
