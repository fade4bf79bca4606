"""The CUDA kernels of span attention in the emulator, against the reference in float64."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulator_build import CSRC, compiled_by_nvcc, disassembled, needs_nvcc
from span_attention_cases import (
    Case,
    all_cases,
    documents,
    failures,
    head_of,
    packed_case,
    readable_by_tma,
    run_program,
)
from torch import Tensor

from mmkernels import RowSpans
from mmkernels.check.suite import SMALL_PLAIN_DRAWS

KERNELS = {
    "sm_80": CSRC / "cuda" / "span_attention" / "forward_sm80.cu",
    "sm_90a": CSRC / "cuda" / "span_attention" / "forward_sm90.cu",
}
SOURCES = ["span_attention.cpp", *map(str, KERNELS.values())]


@pytest.fixture(params=KERNELS)
def kernel(request) -> str:
    return request.param


def run_cases(run, kernel: str, folder: Path, cases: list[Case]) -> list[tuple[Tensor, Tensor]]:
    """out and lse of each."""
    if kernel == "sm_90a":
        cases = [readable_by_tma(case) for case in cases]
    packed = [packed_case(case, results=[case.out_shape]) for case in cases]
    results, found = run_program(run, folder, SOURCES, kernel, cases, packed), []
    for case in cases:
        batch, queries, heads, _ = case.out_shape
        out = results.heads(case, case.out_shape)
        lse = results.numbers(torch.float32, batch * queries * heads)
        found.append((out, lse.view(batch, heads, queries)))
    assert not results.left
    return found


def assert_within_the_budget(cases: list[Case], results: list[tuple[Tensor, Tensor]]) -> None:
    found = []
    for case, result in zip(cases, results, strict=True):
        draws = [case, *(case.draw() for _ in range(SMALL_PLAIN_DRAWS))]
        found += failures(case, "out lse", result, [(each.plain(), each.truth()) for each in draws])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_within_the_budget(run, kernel, seed, tmp_path, dtype):
    served = [case for case in all_cases(random.Random(seed)) if kernel == "sm_80" or head_of(case) <= 256]
    cases = [replace(case, dtype=dtype).draw() for case in served]
    assert_within_the_budget(cases, run_cases(run, kernel, tmp_path, cases))


def runs_that_no_query_has(queries: int, keys: int) -> RowSpans:
    """Between, before and after those that all have."""
    lo = torch.tensor([9, 3, 150, 150, 0], dtype=torch.int32)
    hi = torch.tensor([9, 140, 20, keys, 0], dtype=torch.int32)
    return RowSpans(*(x[:, None].repeat(1, queries) for x in (lo, hi)), keys)


def test_walks_of_many_steps(run, tmp_path):
    """A step of the kernel for Hopper is 128 keys: more of them than stages, cut on the left, and run after run."""
    cases = [
        Case("many steps", RowSpans.full(130, 900), 2, 1, 64, place="one row").draw(),
        Case("long window", documents(280, window=150), 1, 1, 128).draw(),
        Case("runs that no query has", runs_that_no_query_has(40, 300), 2, 1, 80).draw(),
    ]
    assert_within_the_budget(cases, run_cases(run, "sm_90a", tmp_path, cases))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("kernel", "head", "poisoned"),
    [("sm_80", 80, (3, 40, 100, 115)), ("sm_80", 320, (100,)), ("sm_90a", 80, (3, 40, 100, 115))],
)
def test_what_a_query_does_not_see_reaches_it_in_no_way(run, kernel, head, poisoned, tmp_path, poison):
    """To the bit; and what it sees, however late in the walk, does."""
    clean = Case("documents", documents(20, 90, 13, padding=3), head_size=head).draw()
    mask, cases = clean.spans.to_dense(), [clean]
    for key in poisoned:  # of all three warps that look through the values for Hopper
        for name, column in (("k", slice(None)), ("v", 7)):
            dirty = replace(clean, name=f"{name} {key}", k=clean.k.clone(), v=clean.v.clone())
            getattr(dirty, name)[0, key, :, column] = poison
            cases.append(dirty)
    (expected, expected_lse), *results = run_cases(run, kernel, tmp_path, cases)
    for case, (out, lse) in zip(cases[1:], results, strict=True):
        name, key = case.name.split()
        sees = mask[:, int(key)]
        assert torch.equal(out[:, ~sees], expected[:, ~sees]), case.name
        assert torch.equal(lse[..., ~sees], expected_lse[..., ~sees]), case.name
        assert name == "k" or not out[:, sees, :, 7].isfinite().any(), case.name
        assert name == "v" or poison == torch.inf or out[:, sees].isnan().all(), case.name


def test_a_query_that_is_not_a_number_spoils_itself_alone(run, kernel, tmp_path):
    clean = Case("documents", documents(70), head_size=64).draw()
    dirty = replace(clean, q=clean.q.clone())
    dirty.q[0, 41, 1, 5] = torch.nan
    (expected, _), (out, lse) = run_cases(run, kernel, tmp_path, [clean, dirty])
    assert out[0, 41, 1].isnan().all() and lse[0, 1, 41].isnan()
    out[0, 41, 1] = expected[0, 41, 1]
    assert torch.equal(out, expected)


def test_heads_that_hoppers_kernel_does_not_serve_are_refused(run, tmp_path):
    case = Case("wide", documents(3), head_size=257, place="gaps").draw()
    (tmp_path / "cases").write_bytes(packed_case(case, results=[case.out_shape]))
    ran = run(SOURCES, "sm_90a", str(tmp_path / "cases"), str(tmp_path / "results"))
    assert ran.returncode == 1 and "heads have to be of at most 256 numbers" in ran.stdout, ran.stdout


@needs_nvcc
def test_ptxas_leaves_hoppers_kernel_as_it_is(tmp_path):
    """It says so where it does not; of the rest, tests/compile looks at the module that was built."""
    for listing in disassembled(compiled_by_nvcc(KERNELS["sm_90a"], "sm_90a", tmp_path)):
        assert_overlap(listing)


def assert_overlap(listing: str) -> None:
    """What ptxas may undo without a word: the softmax's exponentials lie between the wait for scores and that for the
    sum of values, whose product is issued before them."""
    found = re.findall(r"HGMMA|DEPBAR.LE gsb0, 0x[01]|MUFU.EX2|UTMALDG|HMMA|LDL|STL", listing)
    order = [name for name, _ in itertools.groupby(x for x in found if x != "UTMALDG")]
    wait, wait_but_one, product, softmax = "DEPBAR.LE gsb0, 0x0", "DEPBAR.LE gsb0, 0x1", "HGMMA", "MUFU.EX2"
    loop = [softmax, wait, product, wait_but_one]
    assert order == [product, wait, *loop, product, wait]
    assert "UTMALDG" in found
