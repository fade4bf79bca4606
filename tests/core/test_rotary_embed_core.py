"""The compiled rotary embedding at instruction-set levels: right, the same on any number of threads, in bounds."""

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


def test_float16_is_read_and_rounded_as_torch_does(level):
    """Every number there is; and those at and beside the middle of any two, where rounding turns."""
    halves = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.float16)
    same = rotary_embed(halves.view(-1, 1, 8), torch.ones(2**13, 8), torch.zeros(2**13, 8), backend="cpu").flatten()
    finite = halves.isfinite()
    assert torch.equal(same[finite], halves[finite]) and torch.equal(same.isnan(), ~finite)  # inf * 0 of its partner

    wide = halves[finite & (halves >= 0)].sort().values.unique().double()
    middles = torch.cat([wide, (wide[1:] + wide[:-1]) / 2, torch.tensor([65520.0, 65536.0, 1e30, torch.inf])]).float()
    near = [middles, torch.nextafter(middles, torch.tensor(0.0)), torch.nextafter(middles, torch.tensor(torch.inf))]
    numbers = torch.cat([*near, *(-x for x in near), torch.tensor([torch.nan])])
    cos = torch.nn.functional.pad(numbers, (0, -len(numbers) % 8)).view(-1, 8)
    ones = torch.ones(len(cos), 1, 8, dtype=torch.float16)
    found = rotary_embed(ones, cos, torch.zeros_like(cos), backend="cpu").view(-1, 8)
    torch.testing.assert_close(found, cos.half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("program", bounds("sanitize_rotary_embed.cpp"), ids=str)
def test_in_bounds_and_defined(program, passes):
    """With heads that are multiples of nothing and tensors that end where their memory ends."""
    passes(program)
