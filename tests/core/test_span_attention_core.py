"""The compiled span attention at instruction-set levels: right, steady, in bounds, in little memory.

tests/test_check.py covers the level this processor would choose; here others are run, too, and what only the C++ can
get wrong is tried: tails of every block, work cut differently among threads, memory that ends where tensors end.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import bounds, races

from mmkernels import RowSpans, span_attention
from mmkernels.check import run_case, select
from mmkernels.check.span_attention import AttentionCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(*job, id=f"{job[0].name}-{job[1]}") for job in select("span_attention", quick=True)],
)
def test_every_level_equals_the_reference(level, case, dtype, seed):
    outcome = run_case(case, dtype, "cpu", "cpu", seed)
    assert outcome.passed, "\n".join([outcome.reproduce(), *outcome.failures])


def documents(lengths: list[int], **options) -> RowSpans:
    return RowSpans.packed(torch.tensor([0, *lengths]).cumsum(0), **options)


def spans_of_a_segment(queries: int, keys: int, rng: random.Random) -> RowSpans:
    """Any; one in eight sees nothing, and others so much that all share keys. Neighbours see much the same."""
    lo, hi = torch.zeros(2, queries, dtype=torch.int32)
    for i in range(queries):
        first = (keys - 1) * i // queries
        lo[i], hi[i] = max(0, first - rng.randrange(12)), min(keys, first + 9 + rng.randrange(12))
        if rng.randrange(8) == 0:
            hi[i] = lo[i]
    return RowSpans(lo, hi, keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=str)
def test_masks_within_short_segments(level, heads, dtype, seed):
    """Of each few queries only the keys that they see are met: spans that begin and end anywhere in the tiles."""
    rng = random.Random(f"{seed} {heads} {dtype}")
    for keys in (9, 16, 33, 64, 77, 128, 190, 192):
        queries = rng.choice((keys, max(keys // 2, 8), min(2 * keys, 160)))
        dim, value_dim = rng.choice((16, 40, 72)), rng.choice((16, 40, 80, 90))
        causal = documents([keys], causal=True, window=rng.choice((None, 20)))
        for spans in (spans_of_a_segment(queries, keys, rng), causal):
            name = f"{spans.num_queries} queries, {keys} keys"
            case = AttentionCase(name, lambda spans=spans: spans, heads, (dim, value_dim))
            outcome = run_case(case, dtype, "cpu", "cpu", seed)
            assert outcome.passed, f"{name}, heads of {dim} and {value_dim}: {outcome.failures}"


LAYOUTS = {
    "documents": documents([64, 300, 77, 1, 577, 32], causal=True),
    "windows": documents([49] * 20),
    "one query": RowSpans.full(1, 3000),
    "several panels of keys": RowSpans.full(300, 4500),
    "windows that overlap": documents([900], causal=True, window=100),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_the_same_for_any_number_of_threads(same_for_any_threads, level, layout, dtype):
    spans = LAYOUTS[layout]
    q = torch.randn(spans.num_queries, 6, 40).to(dtype)
    k, v = torch.randn(2, spans.num_keys, 2, 40).to(dtype)
    same_for_any_threads(lambda: span_attention(q, k, v, spans, return_lse=True, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_beyond_the_range_of_exp(level, dtype):
    """Logits of thousands: each query sees little but its best key."""
    q, k = torch.randn(2, 150, 2, 64).mul(30).to(dtype)
    v = torch.randn(150, 2, 64).to(dtype)
    out, lse = span_attention(q, k, v, documents([100, 50]), return_lse=True, scale=1.0, backend="cpu")
    assert out.isfinite().all() and lse.isfinite().all()
    best = torch.einsum("ihd,jhd->hij", q.double()[:100], k.double()[:100]).amax(2)
    assert (lse[:, :100] >= best * (1 - 1e-6) - 1e-3).all()


MEMORY = """
import torch
from mmkernels import RowSpans, span_attention
def memory(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
q, k, v = torch.randn(3, {tokens}, 1, 16)
small = RowSpans.full(256, 256)
spans = RowSpans.full({tokens}, {tokens})
span_attention(q[:256], k[:256], v[:256], small, backend="cpu")
before = memory("VmRSS")
span_attention(q, k, v, spans, backend="cpu")
print(memory("VmHWM") - before - q.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_of_16384_tokens(tmp_path):
    """The scores alone would be 1 GB. What a call takes besides its result: tables of the queries, a share a thread."""
    command = [sys.executable, "-c", MEMORY.format(tokens=16384)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 16e6


@pytest.mark.parametrize("program", bounds("sanitize_span_attention.cpp"), ids=str)
def test_in_bounds_and_defined(program, passes):
    """With sizes that are multiples of nothing, spans beyond the keys and tensors that end where their memory ends."""
    passes(program)


@pytest.mark.parametrize("program", races("sanitize_span_attention.cpp"), ids=str)
def test_tasks_do_not_race(program, passes):
    passes(program)
