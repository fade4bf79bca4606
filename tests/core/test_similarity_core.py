"""The compiled largest products at instruction-set levels: right, the same on any number of threads, in bounds."""

from __future__ import annotations

import pytest
import torch
from programs import bounds

from mmkernels import max_similarity, nearest_code
from mmkernels.check import run_case, select

JOBS = [*select("nearest_code"), *select("max_similarity")]


@pytest.mark.parametrize(("case", "dtype"), [pytest.param(*job, id=f"{job[0].name}-{job[1]}") for job in JOBS])
def test_every_level_equals_the_reference(level, case, dtype, seed):
    outcome = run_case(case, dtype, "cpu", "cpu", seed)
    assert outcome.passed, "\n".join([outcome.reproduce(), *outcome.failures])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bitwise_the_same_for_any_number_of_threads(same_for_any_threads, level, dtype):
    x, codes = torch.randn(700, 40).to(dtype).requires_grad_(), torch.randn(900, 40).to(dtype).requires_grad_()

    def results():
        found = nearest_code(x, codes, backend="cpu")
        similar = max_similarity(x.view(100, 7, 40), codes.view(30, 30, 40), backend="cpu")
        gradients = torch.autograd.grad(similar.sum() + found.quantised.square().sum(), (x, codes))
        return [found.indices, found.quantised, similar, *gradients]

    same_for_any_threads(results)


@pytest.mark.parametrize("program", bounds("sanitize_similarity.cpp"), ids=str)
def test_in_bounds_and_defined(program, passes):
    """With sizes that are multiples of nothing, places and indices that are none, and tensors that end where their
    memory ends."""
    passes(program)
