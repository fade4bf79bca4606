"""Two kernels as those to come will be, one for sm_80 and one for sm_90a, in the emulator and under nvcc."""

import subprocess

import pytest
import torch
from emulator_build import HERE, NVCC, compiled_by_nvcc, needs_nvcc

GEMMS = ["gemm_sm80.cu", "gemm_sm90.cu"]


def test_products_are_those_of_float64(run, seed):
    ran = run(["products.cpp", *GEMMS], str(seed))
    assert ran.returncode == 0 and ran.stdout == "right\n", ran.stdout + ran.stderr


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "architecture"),
    [("gemm_sm80.cu", "sm_80"), ("gemm_sm80.cu", "sm_100a"), ("gemm_sm90.cu", "sm_90a"), ("gemm_sm90.cu", "sm_80")],
)
def test_nvcc_compiles_the_same_source(source, architecture, tmp_path):
    """Without a warning and without a spill; code for sm_90a is left out elsewhere, not wrong."""
    compiled_by_nvcc(HERE / source, architecture, tmp_path)


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_launch_is_an_error_that_names_it(tmp_path):
    (tmp_path / "main.cu").write_text(
        """
        #include <cstdio>
        #include "gemm.h"
        int main() {
            mmk::cuda::Gemm gemm{};
            gemm.m = gemm.n = gemm.k = 64;
            gemm.bfloat16 = true;
            puts(mmk::cuda::gemm_sm80(gemm, nullptr).message().c_str());
            puts(mmk::cuda::gemm_sm90(gemm, mmk::cuda::OperandA::kRegisters, nullptr).message().c_str());
        }
        """
    )
    sources = [tmp_path / "main.cu", *(HERE / source for source in GEMMS)]
    subprocess.run([*NVCC, "-arch=sm_90a", f"-I{HERE}", *sources, "-o", tmp_path / "main"], check=True)
    lines = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].startswith("gemm_sm80: launch of 1 x 1 x 1 blocks of 128 x 1 x 1 threads with 19456 bytes"), lines
    assert "cudaError" in lines[0] and lines[1].startswith("gemm_sm90: the driver has no cuTensorMapEncodeTiled"), lines
