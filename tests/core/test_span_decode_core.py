"""Decoding in the compiled core, at instruction-set levels: one or a few queries against a cache.

tests/core/test_span_attention_core.py runs the sanitizers over this path too.
"""

from __future__ import annotations

import pytest
import torch

from mmkernels import RowSpans, span_attention
from mmkernels.check import run_case, select
from mmkernels.check.budget import Quantity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def filled(lengths: list[int], keys: int, queries: int = 1) -> RowSpans:
    """The newest queries of a batch of caches, each filled to its own length."""
    hi = torch.tensor(lengths, dtype=torch.int32)[:, None, None] - torch.arange(queries - 1, -1, -1, dtype=torch.int32)
    return RowSpans(torch.zeros_like(hi), hi, keys)


def beside_prefill(queries: int, keys: list[int]) -> RowSpans:
    """Continuous batching: one sequence brings many tokens, the others one each."""
    offsets = torch.tensor([0, queries, *[1] * len(keys)]).cumsum(0)
    return RowSpans.packed(offsets, torch.tensor([0, queries, *keys]).cumsum(0), causal=True)


CASES = ("decode, 3000 keys", "decode, heads 16/1", "decode, batch of 8", "decode of 5 rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_level_equals_the_reference(level, name, dtype, seed):
    case = next(case for case, _ in select("span_attention", name))
    outcome = run_case(case, dtype, "cpu", "cpu", seed)
    assert outcome.passed, "\n".join([outcome.reproduce(), *outcome.failures])


LAYOUTS = {
    "one row": RowSpans.full(1, 4000),
    "caches": filled([700, 0, 1, 513, 2000, 64], 2000),
    "several rows": filled([700, 1900], 2000, queries=5),
    "beside a prefill": beside_prefill(90, [700, 3, 1024, 1]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(6, 3), (17, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_the_same_for_any_number_of_threads(same_for_any_threads, level, layout, heads, dtype):
    spans = LAYOUTS[layout]
    batch = [spans.batch] if spans.batch else []
    q = torch.randn(*batch, spans.num_queries, heads[0], 72).to(dtype)
    k, v = torch.randn(2, *batch, spans.num_keys, heads[1], 72).to(dtype)
    same_for_any_threads(lambda: span_attention(q, k, v, spans, return_lse=True, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_unfilled_part_of_a_cache_changes_no_bit(level, dtype):
    """Whatever lies there: NaN, infinity, or the keys of a sequence that is gone."""
    spans = filled([700, 33, 1, 512], 800, queries=2)
    q, (k, v) = torch.randn(4, 2, 4, 64).to(dtype), torch.randn(2, 4, 800, 2, 64).to(dtype)
    expected = span_attention(q, k, v, spans, return_lse=True, backend="cpu")
    unfilled = torch.arange(800) >= spans.hi.amax((1, 2))[:, None]
    for rubbish in (torch.nan, torch.inf, -7.0):
        dirty = (x.masked_fill(unfilled[..., None, None], rubbish) for x in (k, v))
        assert all(map(torch.equal, expected, span_attention(q, *dirty, spans, return_lse=True, backend="cpu")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others_of_its_batch(level, dtype):
    """A sequence gives the same bits alone and in a batch."""
    lengths = [700, 1024, 1, 513]
    q, (k, v) = torch.randn(4, 1, 8, 64).to(dtype), torch.randn(2, 4, 1024, 2, 64).to(dtype)
    batched = span_attention(q, k, v, filled(lengths, 1024), backend="cpu")
    for b, length in enumerate(lengths):
        alone = span_attention(q[b], k[b, :length], v[b, :length], RowSpans.full(1, length), backend="cpu")
        assert torch.equal(batched[b], alone)


def test_scores_far_beyond_the_range_of_exp(level):
    """Logits of thousands, the best ones in different chunks: each query sees little but its best key. Only the few
    whose best keys are close have an error at all, so plain PyTorch answers for the elements of a head in any order."""
    errors = [Quantity(name, torch.float32, torch.float32) for name in ("out", "lse")]
    for _ in range(6):
        q, k, v = torch.randn(3, 4, 64) * 30, torch.randn(3000, 4, 64) * 30, torch.randn(3000, 4, 64)
        ours = span_attention(q, k, v, RowSpans.full(3, 3000), return_lse=True, scale=1.0, backend="cpu")
        truth = dense(q.double(), k.double(), v.double())
        for order in (torch.randperm(64) for _ in range(20)):
            for error, *values in zip(errors, dense(q[..., order], k[..., order], v), truth, strict=True):
                error.add_plain(*values)
        for error, *values in zip(errors, ours, truth, strict=True):
            error.add_ours(*values)
    assert not any(error.failure() for error in errors), [error.failure() for error in errors]


def dense(q, k, v):
    scores = torch.einsum("ihd,jhd->hij", q, k)
    return torch.einsum("hij,jhd->ihd", scores.softmax(2), v), scores.logsumexp(2)
