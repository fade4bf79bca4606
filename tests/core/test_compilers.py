"""The core by every compiler that the README promises, as far as they are on this machine (.ci/run installs them),
without a warning; and its programs for ARM, where an emulator runs them."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from programs import CSRC, FLAGS, HERE, RUN

KERNELS = sorted(set((CSRC / "cpu").rglob("*.cpp")) - set(RUN))
STRICT = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=fast"]
ARM, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
# The lowest and the highest level have all the code there is between them.
COMPILERS = [(name, level) for name in ("g++-11", "clang++-14", "clang++-19") for level in ("portable", "amx")]


def need(*programs: str) -> None:
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not here; apt-get install it")


@pytest.mark.parametrize(("compiler", "level"), [*COMPILERS, (ARM, "portable")])
def test_compiles_without_a_warning(compiler, level):
    need(compiler)

    def compiled(source: Path) -> str:
        command = [compiler, "-fsyntax-only", *STRICT, f"-I{CSRC}", f"-DMMK_ISA={level}", *FLAGS[level], str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    with ThreadPoolExecutor(2) as pool:
        assert not "".join(pool.map(compiled, KERNELS + RUN))


@pytest.mark.parametrize("program", sorted(HERE.glob("sanitize_*.cpp")), ids=lambda path: path.stem)
def test_runs_on_arm(program, tmp_path):
    """Its tensors end where their memory ends, here too."""
    need(ARM, QEMU)
    built = tmp_path / program.stem
    command = [
        ARM,
        "-std=c++17",
        "-O2",
        "-Wno-psabi",
        "-ffp-contract=fast",
        "-static",
        "-pthread",
        "-DMMK_ISA=portable",
    ]
    subprocess.run([*command, f"-I{CSRC}", str(program), *map(str, RUN), "-o", str(built)], check=True)
    done = subprocess.run([QEMU, str(built)], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("right"), done.stdout + done.stderr
