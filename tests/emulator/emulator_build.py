"""Compiles CUDA sources for the host emulator, with g++ and nothing else, in one of its three builds."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILDS = ("plain", "asan", "race")

COMMON = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
COMMON += ["-Wno-psabi", "-Wno-unknown-pragmas"]  # of parameters as aligned as a CUtensorMap; #pragma unroll
COMMON += ["-fno-omit-frame-pointer"]
COMMON += ["-fno-threadsafe-statics"]  # the race build has no runtime that knows their guards
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
HOST = {  # the emulator itself, and code that calls launchers
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address"],
    "race": ["-O2", "-DMMK_EMULATOR_RACE"],
}
# Local variables that a kernel forgot to initialise hold a pattern, the same in every run.
KERNEL = {
    "plain": ["-O2", "-ftrivial-auto-var-init=pattern"],
    "asan": ["-O1", "-ftrivial-auto-var-init=pattern", *SANITIZERS],
    "race": ["-O1", "-ftrivial-auto-var-init=pattern", "-fsanitize=thread"],  # linked without its library
}
LINK = {"plain": [], "asan": SANITIZERS, "race": []}


def compile_all(build: str, sources: list[Path], into: Path) -> list[Path]:
    """The objects of `sources`: .cu holds kernels, .cpp the emulator or code that calls launchers."""
    into.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        flags = KERNEL[build] if source.suffix == ".cu" else HOST[build]
        made = into / f"{source.name}.o"
        subprocess.run(["g++", "-x", "c++", *COMMON, *flags, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def emulator_sources() -> list[Path]:
    return sorted((CSRC / "emulator").glob("*.cpp"))


def link(build: str, objects: list[Path], program: Path, *flags: str) -> Path:
    subprocess.run(["g++", *LINK[build], *flags, *objects, "-ldl", "-o", program], check=True)
    return program


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
NVCC = ["nvcc", "-std=c++17", "-O3", f"-I{CSRC}", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]


def compiled_by_nvcc(source: Path, architecture: str, folder: Path) -> None:
    """Fails at a warning, and at a register that was spilt."""
    command = [*NVCC, f"-arch={architecture}", "-Xptxas", "-v", "-c", source, "-o", folder / "object"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    spills = [line for line in ran.stderr.splitlines() if "spill stores" in line]
    assert spills and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), ran.stderr
    assert "serialized" not in ran.stderr  # ptxas says so where it had to wait for a wgmma earlier than the source does
