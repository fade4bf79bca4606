"""The compiled backward of span attention at instruction-set levels: right, steady, in bounds, in little memory.

test_span_attention_core.py runs the quick cases, gradients included; here come those that only the backward cuts up:
keys in chunks that several tasks share, query heads that share keys, segments that come back to keys.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import bounds, races

from mmkernels import RowSpans, span_attention
from mmkernels.check import run_case, select

CASES = ("full 70x2100", "heads 5/1", "last image", "small, softcap", "small runs")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(*job, id=f"{name}-{job[1]}") for name in CASES for job in select("span_attention", name)],
)
def test_every_level_equals_the_reference(level, case, dtype, seed):
    outcome = run_case(case, dtype, "cpu", "cpu", seed)
    assert outcome.passed, "\n".join([outcome.reproduce(), *outcome.failures])


def documents(lengths: list[int], **options) -> RowSpans:
    return RowSpans.packed(torch.tensor([0, *lengths]).cumsum(0), **options)


LAYOUTS = {
    "documents": documents([64, 300, 77, 1, 577, 32], causal=True),
    "chunks of keys": RowSpans.full(120, 4500),
    "chunks of causal keys": documents([2300, 50], causal=True),
    "windows that overlap": documents([900], causal=True, window=100),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_the_same_for_any_number_of_threads(same_for_any_threads, layout, dtype):
    spans = LAYOUTS[layout]
    q = torch.randn(spans.num_queries, 4, 40).to(dtype).requires_grad_()
    k, v = (torch.randn(spans.num_keys, 2, 40).to(dtype).requires_grad_() for _ in range(2))
    out = span_attention(q, k, v, spans, backend="cpu")
    upstream = torch.randn_like(out)
    same_for_any_threads(lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True))


@pytest.mark.parametrize("dim", [64, 72])
def test_large_gradients_are_those_of_their_parts(dim):
    """From 8 MB on they are written past the caches, if rows are whole lines."""
    lengths = [60] * 40
    q, k, v, upstream = torch.randn(4, sum(lengths), 16, dim)
    for x in (q, k, v):
        x.requires_grad_()
    assert q.nbytes >= 8 << 20
    whole = gradients(q, k, v, upstream, lengths)
    halves = [
        gradients(*(x[part] for x in (q, k, v, upstream)), lengths[:20]) for part in (slice(1200), slice(1200, None))
    ]
    assert all(map(torch.equal, whole, map(torch.cat, zip(*halves, strict=True))))


def gradients(q, k, v, upstream, lengths):
    out = span_attention(q, k, v, documents(lengths), backend="cpu")
    return torch.autograd.grad(out, (q, k, v), upstream)


MEMORY = """
import torch
from mmkernels import RowSpans, span_attention
def memory(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
torch.set_num_threads(2)
def step(tokens):
    q, k, v = (torch.randn(tokens, 1, {dim}, requires_grad=True) for _ in range(3))
    spans = RowSpans.packed(torch.tensor([0, tokens]), causal=True, window={window})
    before = memory("VmRSS")
    span_attention(q, k, v, spans, backend="cpu").sum().backward()
    return memory("VmHWM") - before, q.nbytes
step(64)
more, size = step({tokens})
print(more / size)
"""


def memory_of_a_step(folder: Path, **sizes) -> float:
    """Of forward and backward, in tensors of q's size."""
    run = subprocess.run([sys.executable, "-c", MEMORY.format(**sizes)], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_of_32768_tokens(tmp_path):
    """P would be 2000 times q. A call takes three gradients, packed rows a thread, and dQ a chunk of keys."""
    assert memory_of_a_step(tmp_path, tokens=32768, dim=16, window=2048) < 24


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_of_wide_heads(tmp_path):
    """A number of a head of 512 takes what one of a head of 256 does."""
    narrow, wide = (memory_of_a_step(tmp_path, tokens=4096, dim=dim, window=None) for dim in (256, 512))
    assert wide < 24 and wide < 1.5 * narrow


@pytest.mark.parametrize("program", bounds("sanitize_span_attention_backward.cpp"), ids=str)
def test_in_bounds_and_defined(program, passes):
    """With sizes that are multiples of nothing, spans beyond the keys and tensors that end where their memory ends."""
    passes(program)


@pytest.mark.parametrize("program", races("sanitize_span_attention_backward.cpp"), ids=str)
def test_tasks_do_not_race(program, passes):
    passes(program)
