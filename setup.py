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
RECORD = "_build.json"  # beside the core: why it is missing, for `mmkernels info`


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        package = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        missing = self._build(package)
        if missing:
            print(f"warning: {missing['reason']}; mmkernels installs without it. {missing['mend']}", file=sys.stderr)
        (package / RECORD).write_text(json.dumps(missing) + "\n")

    def _build(self, package: Path) -> dict[str, str]:
        """Build into `package`; what went wrong and what mends it, or nothing."""
        wanted = os.environ.get("MMKERNELS_NATIVE", "auto")
        if wanted == "0":
            return {"reason": "left out by MMKERNELS_NATIVE=0 at install", "mend": REINSTALL}
        try:
            self._run_cmake(package)
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted == "require":
                raise
            mend = f"install a C++17 compiler (g++ 11 or later), then {REINSTALL}"
            return {"reason": f"the compiled core was not built: {_why(error)}", "mend": mend}
        return {}

    def _run_cmake(self, package: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *(["-GNinja"] if shutil.which("ninja") else []),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "-S", str(SOURCE), "-B", str(build), *configure], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.get_ext_fullpath("mmkernels._core"))
        record = Path(self.build_lib, "mmkernels", RECORD)
        if record.exists() and record.parent.resolve() != built.parent.resolve():
            shutil.copy(record, SOURCE / "mmkernels" / RECORD)


def _why(error: Exception) -> str:
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))):
        return "no C++ compiler was found"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} was not found"
    return f"{error} (pip install -v shows the compiler's messages)"


setup(
    ext_modules=[Extension("mmkernels._core", sources=[], optional=True)],  # optional: a missing file is no error
    cmdclass={"build_ext": CMakeBuild},
)
