"""The compiled rotary embedding at every instruction-set level: right, the same on any number of threads, in bounds."""

from __future__ import annotations

import pytest
import torch
from programs import bounds

from mmkernels import rotary_embed
from mmkernels.check import run_case, select


@pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(*job, id=f"{job[0].name}-{job[1]}") for job in select("rotary_embed")]
)
def test_every_level_equals_the_reference(level, case, dtype, seed):
    outcome = run_case(case, dtype, "cpu", "cpu", seed)
    assert outcome.passed, "\n".join([outcome.reproduce(), *outcome.failures])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bitwise_the_same_for_any_number_of_threads(same_for_any_threads, level, dtype):
    x, angles = torch.randn(1100, 4, 80).to(dtype), torch.randn(1100, 80)
    same_for_any_threads(lambda: [rotary_embed(x, angles.cos(), angles.sin(), backend="cpu")])


@pytest.mark.parametrize("program", bounds("sanitize_rotary_embed.cpp"), ids=str)
def test_in_bounds_and_defined(program, passes):
    """With heads that are multiples of nothing and tensors that end where their memory ends."""
    passes(program)
