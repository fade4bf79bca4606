"""Builds the compiled core and the CUDA kernels with CMake, or says why it could not and installs without them.

MMKERNELS_NATIVE=require turns what cannot be built into an error; MMKERNELS_NATIVE=0 leaves both out.
MMKERNELS_CUDA=0 leaves the CUDA kernels out; MMKERNELS_CUDA_ARCHS="80;90a" names what they are built for. They are
built wherever nvcc is, with or without a GPU: images for machines with one are made on machines without.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice, takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve()
RECORD = "_build.json"  # beside the modules: for each part why it is missing, for `mmkernels info`


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.record: dict[str, dict[str, str]] = {}
        super().run()

    def build_extension(self, extension: Extension) -> None:
        part = extension.name.rpartition("._")[2]
        package = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        missing = self._build(part, package)
        if missing:
            print(f"warning: {missing['reason']}; installed without it; mend: {missing['mend']}", file=sys.stderr)
        self.record[part] = missing
        (package / RECORD).write_text(json.dumps(self.record) + "\n")

    def _build(self, part: str, package: Path) -> dict[str, str]:
        """Build into `package`; what went wrong and what mends it, or nothing."""
        for name in {"core": ["MMKERNELS_NATIVE"], "cuda": ["MMKERNELS_NATIVE", "MMKERNELS_CUDA"]}[part]:
            if os.environ.get(name) == "0":
                return {"reason": f"left out by {name}=0 at install", "mend": f"unset {name}"}
        try:
            options = [] if part == "core" else cuda_options()
            if part == "cuda":
                print(f"building the CUDA kernels {minutes(jobs())}; MMKERNELS_CUDA=0 leaves them out", flush=True)
            self._run_cmake(SOURCE if part == "core" else SOURCE / "csrc" / "cuda", part, package, options)
        except (OSError, BuildError) as error:
            if os.environ.get("MMKERNELS_NATIVE") == "require":
                raise
            return explained(part, error)
        return {}

    def _run_cmake(self, source: Path, part: str, package: Path, options: list[str]) -> None:
        import pybind11

        build = Path(self.build_temp, part).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *(["-GNinja"] if shutil.which("ninja") else []),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
            *options,
        ]
        run(["cmake", "-S", str(source), "-B", str(build), *configure])
        run(["cmake", "--build", str(build), "--parallel", str(jobs())])

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.get_ext_fullpath("mmkernels._core"))
        record = Path(self.build_lib, "mmkernels", RECORD)
        if record.exists() and record.parent.resolve() != built.parent.resolve():
            shutil.copy(record, SOURCE / "mmkernels" / RECORD)


class BuildError(Exception):
    """A command failed; the message is what it first complained of."""


def run(command: list[str]) -> None:
    """Run a command whose output is seen as it comes (by pip with -v)."""
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(" ".join(line.split()))
    if process.returncode:
        raise BuildError(complaint(lines) or f"{command[0]} ended with {process.returncode} and no message")


def complaint(lines: list[str]) -> str | None:
    """The first error. CMake says only where it is in the line of that word, and what it is in those that follow."""
    for i, line in enumerate(lines):
        if re.search(r"\b(error|fatal)( [#\w-]+)? *:|^CMake Error", line):  # not a file of that name
            told = takewhile(lambda text: not text.startswith(("CMake ", "Call ", "-- ")), filter(None, lines[i + 1 :]))
            return " ".join(islice(told, 3)) if line.startswith("CMake Error") else line
    return None


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))


def minutes(jobs: int) -> str:
    """About how long the CUDA kernels take; on one core of 2025, 70 seconds for each of the four architectures."""
    archs = re.findall(r"[^\s,;]+", os.environ.get("MMKERNELS_CUDA_ARCHS", "")) or ["80", "90a", "100", "120"]
    return f"for {', '.join(f'sm_{arch}' for arch in archs)}, about {max(1, round(70 * len(archs) / jobs / 60))} min"


def cuda_options() -> list[str]:
    archs = re.findall(r"[^\s,;]+", os.environ.get("MMKERNELS_CUDA_ARCHS", ""))
    return [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DMMKERNELS_CUDA_ARCHS={';'.join(archs)}"]


def find_nvcc() -> str:
    """What CUDACXX names, as CMake has it, or the toolkit that CUDA_HOME names; else in PATH or the usual place."""
    if os.environ.get("CUDACXX"):
        return os.environ["CUDACXX"]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for folder in [f"{home}/bin"] if home else [None, "/usr/local/cuda/bin"]:
        if found := shutil.which("nvcc", path=folder):
            return found
    raise FileNotFoundError(2, "not found", "nvcc")


def explained(part: str, error: Exception) -> dict[str, str]:
    if part == "core":
        mend = "install a C++17 compiler (g++ 11 or later)"
        return {"reason": f"the compiled core was not built: {why(error)}", "mend": mend}
    if isinstance(error, FileNotFoundError) and error.filename == "nvcc":
        mend = "install the CUDA toolkit (12.4 or later, nvcc on PATH or CUDA_HOME)"
        return {"reason": "the CUDA kernels were not built: no nvcc was found", "mend": mend}
    mend = "install a CUDA toolkit (12.4 or later) and a C++ compiler that it accepts"
    return {"reason": f"the CUDA kernels were not built: {why(error)}", "mend": mend}


def why(error: Exception) -> str:
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))):
        return "no C++ compiler was found"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} was not found"
    return f"{error} (pip install -v shows the compiler's messages)"


setup(
    # optional: a missing file is no error
    ext_modules=[Extension(f"mmkernels._{part}", sources=[], optional=True) for part in ("core", "cuda")],
    cmdclass={"build_ext": CMakeBuild},
)
