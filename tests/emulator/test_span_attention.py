"""The CUDA kernels of span attention in the emulator, against the reference in float64."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from emulator_build import CSRC, compiled_by_nvcc, needs_nvcc
from torch import Tensor

from mmkernels import RowSpans
from mmkernels.check import plain
from mmkernels.check.budget import Quantity
from mmkernels.ops.span_attention import reference

KERNELS = {
    "sm_80": CSRC / "cuda" / "span_attention_forward.cu",
    "sm_90a": CSRC / "cuda" / "span_attention_forward_sm90.cu",
}
SOURCES = ["span_attention.cpp", *map(str, KERNELS.values())]


@dataclass
class Case:
    name: str
    spans: RowSpans
    heads: int = 2
    key_heads: int = 1
    head_size: int = 64
    value_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    scale: float | None = None
    softcap: float = 0.0
    place: str = "dense"  # where rows of heads lie in memory: see strides_of
    place_of_inputs: str | None = None  # if not where those of out do
    q: Tensor = None
    k: Tensor = None
    v: Tensor = None

    def draw(self) -> Case:
        batch, queries, keys = self.spans.batch or 1, self.spans.num_queries, self.spans.num_keys
        value_size = self.value_size or self.head_size
        q, k, v = (
            torch.randn(batch, tokens, heads, width).to(self.dtype)
            for tokens, heads, width in (
                (queries, self.heads, self.head_size),
                (keys, self.key_heads, self.head_size),
                (keys, self.key_heads, value_size),
            )
        )
        scale = self.head_size**-0.5 if self.scale is None else self.scale
        return replace(self, value_size=value_size, scale=scale, q=q, k=k, v=v)

    def truth(self) -> tuple[Tensor, Tensor]:
        wide = (x.double() for x in (self.q, self.k, self.v))
        return reference.span_attention(*wide, *self.spans.with_axes(), None, self.scale, self.softcap)

    def plain(self) -> tuple[Tensor, Tensor]:
        return plain.span_attention(
            self.q, self.k, self.v, self.spans, scale=self.scale, softcap=self.softcap or None, return_lse=True
        )


def strides_of(shape: torch.Size, place: str) -> tuple[tuple[int, int, int, int], int]:
    """(strides, offset in numbers from an aligned address)."""
    _, tokens, heads, width = shape
    if place == "heads first":
        return (heads * tokens * width, width, tokens * width, 1), 0
    gap, row_gap, offset = {"dense": (0, 0, 0), "gaps": (8 + -width % 8, 8, 0), "odd": (3, 3, 1)}[place]
    row = heads * (width + gap) + row_gap
    return (tokens * row, row, width + gap, 1), offset


def extent_of(shape: torch.Size, strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if shape.numel() else 0


def packed_case(case: Case) -> bytes:
    """As span_attention.cpp reads it. Gaps between rows hold NaN."""
    batch, queries, heads, head_size = case.q.shape
    lo, hi = case.spans.with_axes()
    sizes = [batch, queries, case.k.shape[1], heads, case.key_heads, head_size, case.value_size, lo.shape[1]]
    header, bodies = [*sizes, case.spans.batch is not None, case.dtype == torch.bfloat16], []
    for x in (case.q, case.k, case.v):
        strides, offset = strides_of(x.shape, case.place_of_inputs or case.place)
        numbers = torch.full((extent_of(x.shape, strides),), torch.nan, dtype=x.dtype)
        if x.numel():
            numbers.as_strided(x.shape, strides).copy_(x)
        header += [numbers.numel(), offset, *strides[:3]]
        bodies.append(numbers.view(torch.int16))
    shape = torch.Size([batch, queries, heads, case.value_size])
    strides, offset = strides_of(shape, case.place)
    header += [extent_of(shape, strides), offset, *strides[:3]]
    bodies += [lo, hi, case.spans.hulls()]
    packed = struct.pack(f"{len(header)}q2d", *header, case.scale, case.softcap)
    return packed + b"".join(x.contiguous().numpy().tobytes() for x in bodies)


def numbers_of(data: bytearray, dtype: torch.dtype, count: int) -> tuple[Tensor, bytearray]:
    """The first `count` of them, and what is left."""
    size = count * dtype.itemsize
    return torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype), data[size:]


@pytest.fixture(params=KERNELS)
def kernel(request) -> str:
    return request.param


def readable_by_tma(case: Case) -> Case:
    """Rows of q, k and v that begin at multiples of 16 bytes, if they do not."""
    aligned = case.place != "odd" and (case.head_size | (case.value_size or 0)) % 8 == 0
    return case if aligned else replace(case, place_of_inputs="gaps")


def run_cases(run, kernel: str, folder: Path, cases: list[Case]) -> list[tuple[Tensor, Tensor]]:
    """out and lse of each."""
    if kernel == "sm_90a":
        cases = [readable_by_tma(case) for case in cases]
    (folder / "cases").write_bytes(b"".join(map(packed_case, cases)))
    ran = run(SOURCES, kernel, str(folder / "cases"), str(folder / "results"))
    names = ", ".join(f"{number}: {case.name}" for number, case in enumerate(cases))
    assert ran.returncode == 0 and ran.stdout == "right\n", f"{ran.stdout}{ran.stderr}\n{names}"
    numbers, results = bytearray((folder / "results").read_bytes()), []
    for case in cases:
        shape = torch.Size([*case.q.shape[:3], case.value_size])
        strides, _ = strides_of(shape, case.place)
        storage, numbers = numbers_of(numbers, torch.int16, extent_of(shape, strides))
        lse, numbers = numbers_of(numbers, torch.float32, shape[:3].numel())
        out = storage.as_strided(shape, strides)
        results.append((out.clone().view(case.dtype), lse.view(shape[0], shape[2], shape[1])))
        out.fill_(-1)
        assert (storage == -1).all(), f"{case.name}: wrote between the rows of out"
    assert not numbers
    return results


def documents(*lengths: int, causal: bool = True, padding: int = 0, **options) -> RowSpans:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return RowSpans.packed(offsets, num_queries=sum(lengths) + padding, causal=causal, **options)


def several_runs(queries: int, keys: int) -> RowSpans:
    """Up to three runs of keys a query, and none for some."""
    edges = torch.rand(queries, keys).argsort(-1)[:, :6].sort(-1).values
    key = torch.arange(keys)[:, None, None]
    seen = ((edges[:, ::2] <= key) & (key < edges[:, 1::2])).any(-1).T
    return RowSpans.from_dense(seen & (torch.rand(queries, 1) < 0.9))


def by_batch(batch: int, queries: int, keys: int) -> RowSpans:
    lo, hi = torch.randint(-3, keys + 4, (2, batch, 1, queries), dtype=torch.int32)
    return RowSpans(lo, hi, keys)


def all_cases(rng: random.Random) -> list[Case]:
    one = rng.randint(1, 60)
    return [
        Case("documents", documents(one, 1, 64, 75 - one, padding=7), head_size=64, place="heads first"),
        Case("whole documents", documents(33, 100, causal=False), 4, 2, 80, place="gaps"),
        Case("window", documents(150, 20, window=17), 1, 1, 128, softcap=20.0),
        Case("full", RowSpans.full(70, 200), 3, 1, 96, softcap=5.0, scale=-0.2),
        Case("several runs", several_runs(rng.randint(1, 90), 130), 2, 2, 72, place="odd"),
        Case("by batch", by_batch(3, 65, rng.randint(1, 99)), 2, 1, 16, value_size=24),
        Case("wide", documents(60, 40), 2, 2, 256, scale=-0.1),
        Case("values narrower", documents(5, 70, causal=False), 1, 1, 192, value_size=128, place="gaps"),
        Case("odd width", by_batch(2, 40, 33), 1, 1, 33, value_size=7),
        Case("no scale", documents(40, causal=False), 1, 1, 88, scale=0.0),
        Case("one token", RowSpans.full(1, 1), 1, 1, rng.randint(1, 256)),
        Case("one query", RowSpans.full(1, 190), 2, 1, 32),
        Case("no keys", RowSpans.full(5, 0), 1, 1, 64),
        Case("no queries", RowSpans.full(0, 5), 1, 1, 64),
    ]


def complaints(case: Case, result: tuple[Tensor, Tensor]) -> list[str]:
    found = []
    for name, ours, rough, truth in zip(("out", "lse"), result, case.plain(), case.truth(), strict=True):
        if truth.numel():
            quantity = Quantity(f"{case.name}, {case.dtype}: {name}", ours.dtype, rough.dtype)
            quantity.add(ours, rough.view(truth.shape), truth)
            found.append(quantity.failure())
    return [failure for failure in found if failure]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_within_the_budget(run, kernel, seed, tmp_path, dtype):
    cases = [replace(case, dtype=dtype).draw() for case in all_cases(random.Random(seed))]
    results = run_cases(run, kernel, tmp_path, cases)
    failures = [failure for case, result in zip(cases, results, strict=True) for failure in complaints(case, result)]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_a_query_does_not_see_reaches_it_in_no_way(run, kernel, tmp_path, poison):
    """To the bit; and what it sees, however late in the walk, does."""
    clean = Case("documents", documents(20, 90, 13, padding=3), head_size=80).draw()
    mask, cases = clean.spans.to_dense(), [clean]
    for key in (3, 60, 100, 115):
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


@needs_nvcc
@pytest.mark.parametrize(("kernel", "architecture"), [("sm_80", "sm_80"), ("sm_80", "sm_90a"), ("sm_90a", "sm_90a")])
def test_nvcc_compiles_the_same_source(kernel, architecture, tmp_path):
    """Without a warning and without a spill."""
    compiled_by_nvcc(KERNELS[kernel], architecture, tmp_path)
