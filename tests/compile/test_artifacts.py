"""What the Triton kernels compile to, on GPUs that are not there (see artifacts.py).

The compiler runs in processes of its own, one a family: Triton decides when a kernel is decorated whether it is to be
interpreted, and the rest of the suite interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import artifacts
import pytest
from draws import some
from limits import complaints, rows_without_kernel
from triton_limits import LIMITS

PRODUCTS = {"clip_stats", "clip_grad", "siglip", "embed", "images_grad", "weight_grad", "forward", "query_grad"}
PRODUCTS |= {"key_grads", "key_grads again"}
# Those whose loops are held to limits, and one of the others.
FAMILIES = [*LIMITS, *some(family for family in artifacts.TARGETS if family not in LIMITS)]
TENSOR_CORES = {"sm80": "hmma", "sm90": "hgmma", "sm100": "utcmma", "cdna": "mfma"}


@cache
def start(family: str) -> subprocess.Popen:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, artifacts.__file__, family]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@cache
def reports(family: str) -> dict[str, dict[str, dict]]:
    for each in FAMILIES:
        start(each)
    out, err = start(family).communicate(timeout=600)
    assert start(family).returncode == 0, f"does not compile for {family}:\n{err[-4000:]}"
    return json.loads(out)


CASES = pytest.mark.parametrize(("family", "call"), [(family, call) for family in FAMILIES for call in artifacts.CALLS])


@CASES
def test_resources(family: str, call: str):
    kernels = reports(family)[call]
    assert set(kernels) == artifacts.CALLS[call].launched
    for name, found in kernels.items():
        assert found["spills"] == 0, f"{name} spills registers: {found}"
        assert found["shared"] <= artifacts.SHARED[family] * 1024, f"{name} asks for too much shared memory: {found}"
        assert found["atomics"] == 0, f"{name} is not deterministic: {found}"
        if "maxnreg" in found:
            blocks = min(found["blocks"], artifacts.SHARED[family] * 1024 // (found["shared"] + 1024))
            assert blocks >= 2, f"{name} gives up registers, but no second block fits: {found}"


@CASES
def test_instructions(family: str, call: str):
    case = artifacts.CALLS[call]
    for name, found in reports(family)[call].items():
        if name not in PRODUCTS:
            continue
        # Of float32 only AMD's tensor cores multiply without rounding; those of sm90 and sm100 take 64 rows and more.
        few = family in ("sm90", "sm100") and isinstance(case, artifacts.Attention) and rows_of(name, found) < 64
        if family == "cdna" or case.dtype != "float32":
            cores = "hmma" if few else TENSOR_CORES[family]
            assert found[cores] > 0, f"{name} does without tensor cores: {found}"
        if family in ("sm90", "sm100") and not few:
            assert found["hmma"] == 0, f"{name} fell back to the tensor core instructions of sm80: {found}"
        if family != "cdna":
            assert found["asynchronous"] >= copies(case, name, found), f"{name} waits for its loads: {found}"


@pytest.mark.parametrize("family", LIMITS)
def test_no_loop_is_slower_than_its_limit(family: str):
    loops = {
        f"{kernel} {call}": artifacts.ways_in(found)
        for call, kernels in reports(family).items()
        for kernel, found in kernels.items()
        if found["hmma"] + found["hgmma"]
    }
    failures = [complaint for kernel, ways in loops.items() for complaint in complaints(kernel, ways, LIMITS[family])]
    assert not failures + rows_without_kernel(LIMITS[family], loops), "\n".join(failures)


def rows_of(kernel: str, found: dict[str, int]) -> int:
    """Rows of the block that an attention kernel keeps: of queries, or of keys."""
    return found["BLOCK_N" if kernel.startswith("key_grads") else "BLOCK_M"]


def copies(case, kernel: str, found: dict[str, int]) -> int:
    """The 16 byte copies a thread makes to load every stage of both operands, if all are asynchronous."""
    if isinstance(case, artifacts.Attention):
        walked = found["BLOCK_M" if kernel.startswith("key_grads") else "BLOCK_N"]
        stages = found["num_stages"] if found["num_stages"] > 1 else 0
        size = 4 if case.dtype == "float32" else 2
        both_loops = walked + max(walked // 2, 16)
        return both_loops * case.row * size * stages // (16 * 32 * found["num_warps"])
    pixels = {"uint8": 1, "bfloat16": 2, "float32": 4}[getattr(case, "image_dtype", case.dtype)]
    if not getattr(case, "gathered", True):
        pixels = 0
    other = 4 if case.dtype == "float32" else 2
    rows, columns = found["BLOCK_M"], found["BLOCK_N"]
    if kernel == "weight_grad":
        rows, columns = columns, rows
    if kernel == "images_grad":
        pixels = other
    step = (rows * pixels + columns * other) * found["BLOCK_K"]
    return step * found["num_stages"] // (16 * 32 * found["num_warps"])
