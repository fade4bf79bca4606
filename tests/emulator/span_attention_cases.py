"""Cases for the CUDA kernels of span attention in the emulator, as span_attention_case.h reads them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmkernels import RowSpans
from mmkernels.check.budget import Quantity
from mmkernels.check.span_attention import plain_span_attention, response_of_lse
from mmkernels.ops.span_attention import reference
from mmkernels.ops.span_attention.params import Params


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
    place_of_inputs: str | None = None  # if not where those of results do
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

    @property
    def params(self) -> Params:
        return Params(*self.spans.with_axes(), None, None, self.scale, self.softcap)

    def truth(self) -> tuple[Tensor, Tensor]:
        return reference.span_attention(*(x.double() for x in (self.q, self.k, self.v)), self.params)

    def plain(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """In float32 as exact as they are promised."""
        q, k, v = (x.to(dtype) for x in (self.q, self.k, self.v))
        options = {"scale": self.scale, "softcap": self.softcap or None, "return_lse": True}
        options |= {} if dtype == self.dtype else {"rounding": self.dtype}
        return plain_span_attention(q, k, v, self.spans, **options)

    @property
    def out_shape(self) -> torch.Size:
        return torch.Size([*self.q.shape[:3], self.value_size])


def strides_of(shape: torch.Size, place: str) -> tuple[tuple[int, int, int, int], int]:
    """(strides, offset in numbers from an aligned address)."""
    _, tokens, heads, width = shape
    if place == "heads first":
        return (heads * tokens * width, width, tokens * width, 1), 0
    if place == "one row":  # of the batch: nobody steps along it
        return (1, heads * width, width, 1), 0
    gap, row_gap, offset = {"dense": (0, 0, 0), "gaps": (8 + -width % 8, 8, 0), "odd": (3, 3, 1)}[place]
    row = heads * (width + gap) + row_gap
    return (tokens * row, row, width + gap, 1), offset


def extent_of(shape: torch.Size, strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if shape.numel() else 0


def place_of(shape: torch.Size, place: str) -> bytes:
    strides, offset = strides_of(shape, place)
    return struct.pack("5q", extent_of(shape, strides), offset, *strides[:3])


def bytes_of(x: Tensor) -> bytes:
    x = x.contiguous()
    return (x.view(torch.int16) if x.dtype.itemsize == 2 else x).numpy().tobytes()


def placed(x: Tensor, place: str) -> bytes:
    """x in its place. Gaps between rows hold NaN."""
    strides, _ = strides_of(x.shape, place)
    numbers = torch.full((extent_of(x.shape, strides),), torch.nan, dtype=x.dtype)
    if x.numel():
        numbers.as_strided(x.shape, strides).copy_(x)
    return bytes_of(numbers)


def packed_case(case: Case, *bodies: Tensor, results: list[torch.Size]) -> bytes:
    """The case with q, k, v and `bodies` as what a kernel reads (four dimensions: tensors of heads), and its results'
    places."""
    batch, queries, heads, head_size = case.q.shape
    lo, hi = case.spans.with_axes()
    sizes = [batch, queries, case.k.shape[1], heads, case.key_heads, head_size, case.value_size, lo.shape[1]]
    sizes += [case.spans.batch is not None, case.dtype == torch.bfloat16]
    packed = struct.pack(f"{len(sizes)}q2d", *sizes, case.scale, case.softcap)
    read, place = [case.q, case.k, case.v, *bodies], case.place_of_inputs or case.place
    packed += b"".join(place_of(x.shape, place) for x in read if x.dim() == 4)
    packed += b"".join(place_of(shape, case.place) for shape in results)
    packed += b"".join(placed(x, place) if x.dtype == case.dtype else bytes_of(x) for x in read)
    return packed + b"".join(map(bytes_of, (lo, hi, case.spans.hulls())))


def head_of(case: Case) -> int:
    """The numbers of its wider one."""
    return max(case.head_size, case.value_size or 0)


def readable_by_tma(case: Case) -> Case:
    """Rows of what is read that begin at multiples of 16 bytes, if they do not."""
    aligned = case.place != "odd" and (case.head_size | (case.value_size or 0)) % 8 == 0
    return case if aligned else replace(case, place_of_inputs="gaps")


def run_program(run, folder: Path, sources: list[str], kernel: str, cases: list[Case], packed: list[bytes]) -> Results:
    (folder / "cases").write_bytes(b"".join(packed))
    ran = run(sources, kernel, str(folder / "cases"), str(folder / "results"))
    names = ", ".join(f"{number}: {case.name}" for number, case in enumerate(cases))
    assert ran.returncode == 0 and ran.stdout == "right\n", f"{ran.stdout}{ran.stderr}\n{names}"
    return Results(bytearray((folder / "results").read_bytes()))


@dataclass
class Results:
    """What a program wrote, from first to last."""

    left: bytearray

    def numbers(self, dtype: torch.dtype, count: int) -> Tensor:
        data, self.left = self.left, self.left[count * dtype.itemsize :]
        return torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)

    def heads(self, case: Case, shape: torch.Size) -> Tensor:
        strides, _ = strides_of(shape, case.place)
        storage = self.numbers(torch.int16, extent_of(shape, strides))
        rows = storage.as_strided(shape, strides)
        result = rows.clone().view(case.dtype)
        rows.fill_(-1)
        assert (storage == -1).all(), f"{case.name}: wrote between the rows of a result"
        return result


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
        Case("other keys", RowSpans.packed(torch.tensor([0, 64, 128]), torch.tensor([0, 150, 300])), 1, 1, 64),
        Case("no scale", documents(40, causal=False), 1, 1, 88, scale=0.0),
        Case("any width", documents(23, 20), 1, 1, rng.randint(1, 256)),
        Case("wider", documents(75, 9, padding=3), 2, 1, 512),
        Case("widest", by_batch(2, 37, 90), 2, 2, 576, value_size=512, place="heads first"),
        Case("any width, wider", documents(23, 40, causal=False), 2, 1, rng.randint(257, 576), softcap=9.0),
        Case("values wider", several_runs(40, 70), 1, 1, rng.randint(1, 320), value_size=321, place="odd"),
        Case("one token", RowSpans.full(1, 1), 1, 1, rng.randint(1, 256)),
        Case("one query", RowSpans.full(1, 190), 2, 1, 32),
        Case("no keys", RowSpans.full(5, 0), 1, 1, 64),
        Case("no queries", RowSpans.full(0, 5), 1, 1, 64),
    ]


def failures(case: Case, names: str, results, drawn: list[tuple]) -> Iterator[str]:
    """drawn: what plain PyTorch makes, and the truth, of the case and of other draws: of few numbers, one would be
    luck."""
    (rough, truths), *_ = drawn
    for i, (name, ours, plain_result, truth) in enumerate(zip(names.split(), results, rough, truths, strict=True)):
        if truth.numel():
            quantity = Quantity(f"{case.name}, {case.dtype}: {name}", ours.dtype, plain_result.dtype)
            quantity.add_ours(ours, truth)
            response = response_of_lse(case.softcap, case.dtype) if name == "lse" else 0.0
            for others, exact in drawn:
                quantity.add_plain(others[i].view(truth.shape), exact[i], response)
            if failure := quantity.failure():
                yield failure
