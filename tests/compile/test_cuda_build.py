"""What CMake makes of MMKERNELS_CUDA_ARCHS, seen without a GPU and without the kernels that take long to compile."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def configure(folder: Path, architectures: str) -> subprocess.CompletedProcess:
    options = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    command = ["cmake", "-G", "Ninja", "-S", CUDA, "-B", folder, *options, f"-DMMKERNELS_CUDA_ARCHS={architectures}"]
    return subprocess.run(command, capture_output=True, text=True)


def test_an_architecture_that_no_kernel_serves_is_refused(tmp_path):
    done = configure(tmp_path, "75;80")
    assert done.returncode != 0 and "'75' is no architecture that the kernels serve" in done.stderr


def test_launchers_for_hopper_refuse_where_the_build_holds_no_code_for_it(tmp_path):
    """All that the headers declare: their kernels' bodies are left out, and a call that did nothing would leave its
    results as they were. test_cuda_module.py sees that they don't refuse in a build that has the code."""
    declared = [
        launcher
        for header in sorted(CUDA.glob("*/call.h"))
        for launcher in re.findall(
            r"^Error (\w+_sm90)\(const (\w+)& call, cudaStream_t stream\);", header.read_text(), re.M
        )
    ]
    assert len(declared) >= 5
    calls = "".join(f"    std::puts({name}({call}{{}}, nullptr).message().c_str());\n" for name, call in declared)
    program = tmp_path / "program.cpp"
    program.write_text(
        '#include <cstdio>\n#include "cuda/contrastive/call.h"\n#include "cuda/span_attention/call.h"\n'
        "using namespace mmk::cuda;\n"
        f"int main() {{\n{calls}}}\n"
    )
    assert configure(tmp_path / "build", "80").returncode == 0
    sources = [*CUDA.rglob("*_sm90.cu"), CUDA / "contrastive" / "passes.cu", CUDA / "span_attention" / "prepare.cu"]
    subprocess.run(["ninja", "-C", tmp_path / "build", *(f"{source}^" for source in sources)], check=True)
    objects = (tmp_path / "build").rglob("*.cu.o")
    subprocess.run(["nvcc", f"-I{CUDA.parent}", program, *objects, "-o", tmp_path / "program"], check=True)
    said = subprocess.check_output([tmp_path / "program"], text=True).splitlines()
    for (name, _), message in zip(declared, said, strict=True):
        assert message.startswith(f"{name}: this build holds no code for sm_90a") and "; mend: " in message
