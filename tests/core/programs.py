"""The C++ programs that try the kernels of one instruction-set level: built all at once, in the background."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  (the core works on its threads)
from draws import some

from mmkernels import _core


def levels_to_try(runs: Sequence[str]) -> list[str]:
    """Of the levels this processor runs, in their order: the lowest and the highest, which have all the code there is
    between them, below AMX, which serves bfloat16 alone, the one that serves the rest; and one with other vectors."""
    certain = {runs[0], runs[-1], runs[-2 if runs[-1] == "amx" else -1]}
    drawn = some(each for each in runs if each not in certain)
    return [each for each in runs if each in certain or each in drawn]


LEVELS = levels_to_try(_core.isa_levels())
HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
RUN = sorted((CSRC / "cpu" / "run").glob("*.cpp"))  # what is not compiled once per level
FLAGS = {  # as in CMakeLists.txt, which test_compilers.py sees
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
FLAGS["avx512_bf16"] = [*FLAGS["avx512"], "-mavx512bf16"]
FLAGS["amx"] = [*FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
FLAGS["neon"] = ["-DMMK_NEON"]
FLAGS["neon_bf16"] = ["-DMMK_NEON", "-march=armv8.2-a+bf16"]

# What AddressSanitizer would find as well is left to it, and its checks are calls: the templates of the kernels would
# else take a minute to compile. Alignment matters off x86, to the code of the portable level.
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow,vptr"]
ADDRESS += ["--param", "asan-instrumentation-with-call-threshold=0"]
CHECKS = {
    "guarded": [],  # nothing but the page that follows each tensor
    "sanitized": [*ADDRESS, "-fno-sanitize=alignment"],
    "aligned": ADDRESS,
    "threads": ["-fsanitize=thread"],
}

# Fresh memory is full of NaN, so that what was never written shows.
ENVIRONMENT = os.environ | {"ASAN_OPTIONS": "max_malloc_fill_size=1073741824:malloc_fill_byte=255"}


@dataclass(frozen=True)
class Program:
    source: str
    level: str
    check: str

    def __str__(self) -> str:
        return f"{self.level}-{self.check}"

    def build(self, folder: Path) -> Path:
        built = folder / f"{Path(self.source).stem}-{self}"
        sources = [HERE / self.source, *RUN]
        command = ["g++", "-std=c++17", "-O1", "-g1", "-Wno-psabi", "-ffp-contract=fast", "-fno-omit-frame-pointer"]
        command += [*CHECKS[self.check], "-fno-sanitize-recover=all", *FLAGS[self.level], f"-DMMK_ISA={self.level}"]
        command += [f"-I{CSRC}", *map(str, sources), "-pthread", "-o", str(built)]
        compiler = subprocess.run(command, capture_output=True, text=True)
        assert compiler.returncode == 0, compiler.stderr
        return built


def bounds(source: str) -> list[Program]:
    checks = {level: "guarded" for level in LEVELS} | {LEVELS[-1]: "sanitized"} | {LEVELS[0]: "aligned"}
    return [Program(source, level, check) for level, check in checks.items()]


def races(source: str) -> list[Program]:
    """The tasks are the same at every level."""
    return [Program(source, LEVELS[0], "threads")]


class Builds:
    """Programs by and by, as many at once as there are processors."""

    def __init__(self, programs: Iterable[Program], folder: Path):
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._built: dict[Program, Future[Path]] = {each: self._pool.submit(each.build, folder) for each in programs}

    def run(self, program: Program) -> None:
        """It must print "right" and nothing else."""
        path = self._built[program].result()
        run = subprocess.run([path], env=ENVIRONMENT, capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout == "right\n", run.stdout + run.stderr

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
