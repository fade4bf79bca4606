"""The core by every compiler that the README promises, as far as they are on this machine (.ci/run installs them),
without a warning; and its programs for ARM, where an emulator runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
from draws import some
from programs import CSRC, FLAGS, HERE, RUN

KERNELS = sorted(set((CSRC / "cpu").rglob("*.cpp")) - set(RUN))
STRICT = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=fast"]
ARM, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
X86, AARCH64 = ("portable", "avx2", "avx512", "avx512_bf16", "amx"), ("portable", "neon", "neon_bf16")
# The lowest and the highest level have all the code there is between them.
COMPILERS = [(name, level) for name in ("g++-11", "clang++-14", "clang++-19") for level in ("portable", "amx")]
COMPILERS += [(ARM, "portable"), (ARM, "neon_bf16")]


def need(*programs: str) -> None:
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not here; apt-get install it")


@pytest.mark.parametrize(("compiler", "level"), COMPILERS)
def test_compiles_without_a_warning(compiler, level):
    need(compiler)

    def compiled(source: Path) -> str:
        command = [compiler, "-fsyntax-only", *STRICT, f"-I{CSRC}", f"-DMMK_ISA={level}", *FLAGS[level], str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    with ThreadPoolExecutor(2) as pool:
        assert not "".join(pool.map(compiled, KERNELS + RUN))


@pytest.mark.parametrize(("processor", "compiler", "levels"), [("x86_64", "g++", X86), ("aarch64", ARM, AARCH64)])
def test_levels_are_compiled_with_the_flags_that_are_tested(processor, compiler, levels, tmp_path):
    """CMakeLists.txt, csrc/cpu/run/isa.h and programs.py each have the list."""
    need(compiler)
    system = ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={processor}", f"-DCMAKE_CXX_COMPILER={compiler}"]
    python = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    command = ["cmake", "-S", str(CSRC.parent), "-B", str(tmp_path), "-GNinja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    subprocess.run([*command, *system, *python], check=True, capture_output=True)
    found = {}
    for each in json.loads((tmp_path / "compile_commands.json").read_text()):
        if level := re.search(r"-DMMK_ISA=(\w+)", each["command"]):
            flags = re.findall(r" (-m\S+|-DMMK_NEON)", each["command"])
            found.setdefault(level[1], set()).add(frozenset(set(flags) - {"-mprefer-vector-width=512"}))
    assert found == {level: {frozenset(FLAGS[level])} for level in levels}
    header = [compiler, "-E", "-P", f"-I{CSRC}", "-x", "c++", str(CSRC / "cpu" / "run" / "isa.h")]
    enumerators = re.search(r"enum class Isa \{([^}]*)\}", subprocess.check_output(header, text=True))
    named = [name.replace("_", "") for name in levels]
    assert [each.strip().lower() for each in enumerators[1].split(",") if each.strip()] == [
        f"k{name}" for name in named
    ]


def for_arm(source: Path, level: str, folder: Path) -> Path:
    built = folder / f"{source.stem}-{level}"
    command = [ARM, "-std=c++17", "-O2", "-Wno-psabi", "-ffp-contract=fast", "-static", "-pthread"]
    command += [f"-DMMK_ISA={level}", *FLAGS[level], f"-I{CSRC}", str(source), *map(str, RUN), "-o", str(built)]
    subprocess.run(command, check=True)
    return built


# This level has all the code that neon has, and more. Three of the programs, which take a minute each.
PROGRAMS = [(HERE / name, "neon_bf16") for name in some(sorted(path.name for path in HERE.glob("sanitize_*")), 3)]
QUICK = [(HERE / f"sanitize_{name}.cpp", level) for name in ("patch_embed", "rotary_embed") for level in AARCH64[:2]]


@pytest.mark.parametrize(("program", "level"), PROGRAMS + QUICK, ids=lambda x: getattr(x, "stem", x))
def test_runs_on_arm(program, level, tmp_path):
    """Its tensors end where their memory ends, here too."""
    need(ARM, QEMU)
    done = subprocess.run([QEMU, str(for_arm(program, level, tmp_path))], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("right"), done.stdout + done.stderr


@pytest.mark.parametrize(("processor", "levels"), [("cortex-a72", "portable neon"), ("max", "portable neon neon_bf16")])
def test_a_level_is_chosen_that_the_arm_processor_runs(processor, levels, tmp_path):
    need(ARM, QEMU)
    source = tmp_path / "levels.cpp"
    source.write_text(
        '#include <cstdio>\n#include "cpu/run/isa.h"\nint main() {\n'
        '    for (auto isa : mmk::usable_isas()) std::printf("%s ", mmk::name(isa));\n'
        "    std::puts(mmk::name(mmk::chosen_isa()));\n}\n"
    )
    command = [QEMU, "-cpu", processor, str(for_arm(source, "portable", tmp_path))]
    assert subprocess.check_output(command, text=True) == f"{levels} {levels.split()[-1]}\n"
    capped = os.environ | {"MMKERNELS_CPU_ISA": "neon"}
    assert subprocess.check_output(command, text=True, env=capped) == f"{levels} neon\n"
