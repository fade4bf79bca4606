"""Compiles CUDA sources for the host emulator, with g++ and nothing else, in one of its three builds."""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
from filelock import FileLock

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


def compile_all(build: str, sources: list[Path], into: Path, *flags: str) -> list[Path]:
    """The objects of `sources`: .cu holds kernels, .cpp the emulator or code that calls launchers. One that is in the
    folder already is not made again."""
    into.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        made = into / f"{source.parent.name}-{source.name}.o"
        with FileLock(f"{made}.lock"):
            if made.exists():
                return made
            own = KERNEL[build] if source.suffix == ".cu" else HOST[build]
            subprocess.run(["g++", "-x", "c++", *COMMON, *own, *flags, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def emulator_sources() -> list[Path]:
    return sorted((CSRC / "emulator").glob("*.cpp"))


def link(build: str, objects: list[Path], program: Path, *flags: str) -> Path:
    subprocess.run(["g++", *LINK[build], *flags, *objects, "-ldl", "-o", program], check=True)
    return program


def link_module(build: str, objects: list[Path], into: Path, module: Path) -> Path:
    """mmkernels._cuda for tensors on the CPU: the bindings and every kernel, compiled into a folder, and the emulator's
    `objects`."""
    kernels = compile_all(build, sorted((CSRC / "cuda").rglob("*.cu")), into)
    include = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    defined = ["-DMMK_EMULATED", '-DMMK_CUDA_ARCHITECTURES="80 90a"']
    # Bindings touch no tensor: no build needs them watched, and all share one object.
    bindings = compile_all("plain", [CSRC / "cuda" / "bindings.cpp"], into.parent / "bindings", *include, *defined)
    return link(build, objects + kernels + bindings, module, "-shared")


def run_emulated(build: str, module: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m ...` with this module as its mmkernels._cuda."""
    if build == "asan":  # python itself knows nothing of it
        libraries = (f"lib{name}.so" for name in ("asan", "ubsan", "stdc++"))
        paths = (subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in libraries)
        environment["LD_PRELOAD"] = " ".join(paths)
    # A thread that met an error is abandoned, with what it had allocated.
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, HERE / "emulated.py", module, *command],
        env=os.environ | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
NVCC = ["nvcc", "-std=c++17", "-O3", f"-I{CSRC}", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]


def compiled_by_nvcc(source: Path, architecture: str, folder: Path) -> Path:
    """Fails at a warning, and at a register that was spilt. Returns the object."""
    command = [*NVCC, f"-arch={architecture}", "-Xptxas", "-v", "-c", source, "-o", folder / "object"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    spills = [line for line in ran.stderr.splitlines() if "spill stores" in line]
    assert spills and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), ran.stderr
    # Where ptxas had to wait for a wgmma earlier than the source does, or could not keep to a number of registers.
    assert "Potential Performance Loss" not in ran.stderr, ran.stderr
    return folder / "object"


def disassembled(compiled: Path) -> list[str]:
    """The instructions of each kernel; of none without cuobjdump."""
    beside_triton = Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin"
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=beside_triton)
    if cuobjdump is None:
        return []
    listing = subprocess.run([cuobjdump, "-sass", compiled], capture_output=True, text=True, check=True).stdout
    return listing.split("Function : ")[1:]
