"""Spans in the intervals of cuDNN's flex attention: the same pairs, and numbers that cuDNN accepts."""

import random

import pytest
import torch
from span_layouts import BUILDERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import RowSpans

ANY_LENGTHS = (1, 9, 40)


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def told_by(numbers: list[int], num_keys: int) -> list[bool]:
    """What a query's numbers show it, interval by interval; the first begins at key 0."""
    bounds = [0, *numbers]
    seen = [False] * num_keys
    for begin, end in zip(bounds[::2], bounds[1::2], strict=True):
        seen[begin:end] = [True] * (end - begin)
    return seen


def check(spans: RowSpans) -> Tensor:
    found = spans.to_intervals()
    dense = spans.to_dense().flatten(0, -2)
    assert found.dtype == torch.int32 and found.is_contiguous()
    assert found.shape == (1, 2 * spans.runs + 1, len(dense))  # an odd number of numbers; queries of all rows
    assert not found.numel() or (found.min() >= 0 and found.max() <= spans.num_keys)
    assert (found.diff(dim=1) >= 0).all()
    for query, row in enumerate(dense.tolist()):
        assert told_by(found[0, :, query].tolist(), spans.num_keys) == row
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_the_same_pairs(name, rng):
    for _ in range(12):
        check(BUILDERS[name](rng, ANY_LENGTHS).spans)


def of_any_runs(rng: random.Random) -> RowSpans:
    """Up to four runs a query, some of them empty and anywhere, some beyond the keys, in strided tensors."""
    batch, runs, queries, keys = rng.choice([None, 1, 3]), rng.randint(1, 4), rng.randint(1, 20), rng.randint(1, 20)
    places = torch.randint(-2, keys + 3, (batch or 1, queries, 2 * runs)).sort(-1).values.int()
    lo, hi = places.unflatten(-1, (runs, 2)).movedim(1, -1).unbind(2)
    empty = torch.rand(lo.shape) < 0.3
    anywhere = torch.randint(0, keys + 1, lo.shape, dtype=torch.int32)
    lo, hi = torch.where(empty, anywhere, lo), torch.where(empty, anywhere - torch.randint(0, 3, lo.shape).int(), hi)
    return RowSpans(*(x[0] if batch is None else x for x in (lo, hi)), keys)


def test_any_runs(rng):
    for _ in range(60):
        check(of_any_runs(rng))


def test_the_numbers_of_a_small_mask():
    """Two rows of a batch, three queries and five keys each: causal, and without key 1."""
    causal = torch.ones(3, 5, dtype=torch.bool).tril(2)
    spans = RowSpans.from_dense(torch.stack([causal, causal & (torch.arange(5) != 1)]))
    assert check(spans)[0].tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 2, 2, 2],
        [3, 4, 5, 3, 4, 5],
    ]


def test_it_is_what_the_spans_were(rng):
    spans = of_any_runs(rng)
    found = spans.to_intervals()
    before = found.clone()
    spans.lo.fill_(0), spans.hi.fill_(10**6)
    assert torch.equal(found, before)


class NothingIsRead(TorchDispatchMode):
    """Fails where the values of a tensor would have to come to the host, or a shape depends on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        assert not any(tag in func.tags for tag in waits), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_it_does_not_wait_for_the_device(rng):
    with NothingIsRead():
        of_any_runs(rng).to_intervals()
