"""Builds the compiled core with CMake, or says why it could not and lets the package install without it.

MMKERNELS_NATIVE=require turns a core that cannot be built into an error; MMKERNELS_NATIVE=0 leaves it out.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve()
REINSTALL = "pip install --force-reinstall --no-deps mmkernels"


class CMakeBuild(build_ext):
    """Builds mmkernels._core, and writes mmkernels/_build.json for `mmkernels info` to read."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        record = target.parent / "_build.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        wanted = os.environ.get("MMKERNELS_NATIVE", "auto")
        failure = None
        if wanted == "0":
            failure = {"reason": "left out: MMKERNELS_NATIVE=0 at install", "mend": REINSTALL}
        else:
            try:
                self._build(target.parent)
            except (OSError, subprocess.CalledProcessError) as error:
                if wanted == "require":
                    raise
                failure = {"reason": f"the compiled core was not built: {_why(error)}", "mend": _mend()}
                print(
                    f"warning: {failure['reason']}; mmkernels installs without it. Mend: {failure['mend']}",
                    file=sys.stderr,
                )
        record.write_text(json.dumps(failure or {"reason": None}) + "\n")

    def _build(self, destination: Path) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        import pybind11

        cmake = shutil.which("cmake") or "cmake"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        generator = ["-GNinja"] if shutil.which("ninja") else []
        configure = [
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
        ]
        subprocess.run([cmake, "-S", str(SOURCE), "-B", str(build), *generator, *configure], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        return [
            *(path for path in outputs if Path(path).exists()),
            *(str(Path(p).parent / "_build.json") for p in outputs),
        ]


def _why(error: Exception) -> str:
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "no C++ compiler was found"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} was not found"
    return f"{error} (pip install -v shows the compiler's messages)"


def _mend() -> str:
    return f"install a C++17 compiler (g++ 11 or later), then {REINSTALL}"


setup(ext_modules=[Extension("mmkernels._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
