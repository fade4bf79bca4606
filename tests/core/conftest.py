"""What the tests of the compiled core share. They need the core: without it they fail here, they do not pass by."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmkernels import _core

CSRC = Path(__file__).parents[2] / "csrc" / "cpu"
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
FLAGS["avx512_bf16"] = [*FLAGS["avx512"], "-mavx512bf16"]

# Fresh memory is full of NaN, so that what was never written shows.
ENVIRONMENT = os.environ | {"ASAN_OPTIONS": "max_malloc_fill_size=1073741824:malloc_fill_byte=255"}


@pytest.fixture(params=_core.isa_levels())
def level(request, monkeypatch) -> str:
    """Each instruction-set level this processor runs, chosen for the test."""
    monkeypatch.setenv("MMKERNELS_CPU_ISA", request.param)
    assert _core.isa() == request.param
    return request.param


@pytest.fixture
def same_for_any_threads() -> Callable[[Callable[[], Sequence[Tensor]]], None]:
    """same_for_any_threads(compute): its tensors must not differ in a bit, whatever number of threads cuts the work."""

    def check(compute: Callable[[], Sequence[Tensor]]) -> None:
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3, 5, 2):
                torch.set_num_threads(threads)
                results.append(compute())
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for first, again in zip(results[0], other, strict=True):
                assert torch.equal(first, again)

    return check


@pytest.fixture
def passes_under(tmp_path) -> Callable[[str, str, str], None]:
    """passes_under(program, level, sanitizers): builds tests/core/`program` with the kernels of one level and runs it;
    it must print "right" and nothing else."""

    def check(program: str, level: str, sanitizers: str) -> None:
        built = tmp_path / "program"
        sources = [Path(__file__).with_name(program), CSRC / "parallel.cpp", CSRC / "scratch.cpp"]
        command = ["g++", "-std=c++17", "-O1", "-g1", "-Wno-psabi", "-ffp-contract=fast", "-fno-omit-frame-pointer"]
        command += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", *FLAGS[level], f"-DMMK_ISA={level}"]
        subprocess.run([*command, f"-I{CSRC}", *map(str, sources), "-pthread", "-o", str(built)], check=True)
        run = subprocess.run([built], env=ENVIRONMENT, capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout == "right\n", run.stdout + run.stderr

    return check
