"""The compiled patch embedding at instruction-set levels: right, the same for any number of threads, in bounds.

tests/test_check.py covers the level this processor would choose; here others are run, too, and what only the C++ can
get wrong is tried: tails of every tile, work cut differently among threads, memory past the tensors.
"""

from __future__ import annotations

import pytest
import torch
from programs import bounds

from mmkernels import patch_embed
from mmkernels.check import run_case, select


@pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(*job, id=f"{job[0].name}-{job[1]}") for job in select("patch_embed", quick=True)]
)
def test_every_level_equals_the_reference(level, case, dtype, seed):
    outcome = run_case(case, dtype, "cpu", "cpu", seed)
    assert outcome.passed, "\n".join([outcome.reproduce(), *outcome.failures])


def gradients(images, weight, bias, **options):
    """The tokens and the gradients of everything that has one; the upstream gradient is the same at every call."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in (images, weight, bias)]
    tokens = patch_embed(*inputs, backend="cpu", **options)
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(7)).to(tokens.dtype)
    tokens.backward(upstream)
    return [tokens.detach(), *(x.grad for x in inputs if x.requires_grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "size"), [(3, 49), (23, 49)], ids=["few rows", "many rows"])
def test_bitwise_the_same_for_any_number_of_threads(same_for_any_threads, level, dtype, batch, size):
    images = torch.randn(batch, 3, size, size).to(dtype)
    weight, bias = torch.randn(70, 3, 7, 7).to(dtype), torch.randn(70).to(dtype)
    same_for_any_threads(lambda: gradients(images, weight, bias))


def test_a_patch_does_not_depend_on_its_neighbours(level):
    """Whatever tile, block or path a row falls into, its sums are cut at the same places."""
    images, weight = torch.randn(1100, 75), torch.randn(50, 75)
    together = patch_embed(images, weight, backend="cpu")
    for first, count in ((0, 1), (5, 4), (300, 13), (1095, 5)):
        alone = patch_embed(images[first : first + count], weight, backend="cpu")
        assert torch.equal(together[first : first + count], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sliced_an_expanded_and_a_transposed_gradient(level, dtype):
    """What autograd hands over has any strides, zero too: all are read as what they mean."""
    images, weight = torch.randn(2, 3, 28, 42).to(dtype), torch.randn(18, 3, 14, 14).to(dtype)
    wide = torch.randn(2, 7, 40).to(dtype)
    for grad in (
        wide[:, 1:, 3:21],
        wide[:1, :1, :1].expand(2, 6, 18),
        torch.randn(18, 6, 2).to(dtype).permute(2, 1, 0),
    ):
        results = []
        for upstream in (grad, grad.contiguous()):
            inputs = images.clone().requires_grad_(), weight.clone().requires_grad_()
            patch_embed(*inputs, backend="cpu").backward(upstream)
            results.append([x.grad for x in inputs])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_nothing_to_embed(level):
    """No rows: no tokens, and a gradient of zero rather than what the memory held."""
    weight, bias = torch.randn(18, 75, requires_grad=True), torch.randn(18, requires_grad=True)
    tokens = patch_embed(torch.randn(0, 75), weight, bias, backend="cpu")
    assert tokens.shape == (0, 18)
    tokens.sum().backward()
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("program", bounds("sanitize_patch_embed.cpp"), ids=str)
def test_in_bounds_and_defined(program, passes):
    """With sizes that are multiples of nothing and tensors that end where their memory ends."""
    passes(program)
