"""Two kernels as those to come will be, one for sm_80 and one for sm_90a, in the emulator and under nvcc."""

import shutil
import subprocess

import pytest
from emulator_build import CSRC, HERE

GEMMS = ["gemm_sm80.cu", "gemm_sm90.cu"]


def test_products_are_those_of_float64(run, seed):
    ran = run(["products.cpp", *GEMMS], str(seed))
    assert ran.returncode == 0 and ran.stdout == "right\n", ran.stdout + ran.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("source", "architecture"),
    [("gemm_sm80.cu", "sm_80"), ("gemm_sm80.cu", "sm_100a"), ("gemm_sm90.cu", "sm_90a"), ("gemm_sm90.cu", "sm_80")],
)
def test_nvcc_compiles_the_same_source(source, architecture, tmp_path):
    """Without a warning and without a spill; code for sm_90a is left out elsewhere, not wrong."""
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", f"-I{CSRC}", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v", "-c", HERE / source, "-o", tmp_path / "object"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    spills = [line for line in ran.stderr.splitlines() if "spill stores" in line]
    assert spills and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), ran.stderr
    assert "serialized" not in ran.stderr  # ptxas says so where it had to wait for a wgmma earlier than the source does
