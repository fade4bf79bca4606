"""span_attention: against dense softmax on random layouts, documents kept apart, under compile and autocast.

That the backends equal the reference on the fixed cases, within the error budget, is tests/test_check.py's; that the
builders give the masks they promise is tests/test_spans.py's.
"""

import itertools
import random
import re

import pytest
import torch
import torch._dynamo.testing
from dense_attention import dense_attention, evaluate, inputs, threads
from span_layouts import BUILDERS, Layout, int32
from torch import Tensor

from mmkernels import RowSpans, span_attention
from mmkernels.check.budget import Quantity
from mmkernels.check.span_attention import plain_span_attention

NAMES = ("out", "lse", "d_q", "d_k", "d_v")
NAN = float("nan")


@pytest.fixture
def rng(seed) -> random.Random:
    return random.Random(seed)


# ---- against dense softmax -------------------------------------------------------------------------------------------


def drawn_call(rng, layout: Layout, dtype) -> tuple[list[Tensor], Tensor, dict]:
    """Tensors and upstream gradient for a layout, NaN in all that nobody sees; and options."""
    spans, mask = layout.spans, layout.spans.to_dense()
    batch = spans.batch if spans.batch is not None else rng.choice([None, None, 2])
    dims = rng.choice([(16, 16), (64, 64), (72, 72), (5, 5), (40, 24), (32, 80)])
    tensors = inputs(spans, rng.choice([(1, 1), (2, 1), (4, 2), (3, 3)]), dims, dtype, batch)
    q, k, v = (x.detach() for x in tensors)
    d_out = torch.randn(*q.shape[:-1], dims[1], dtype=torch.float64).to(dtype)
    idle, unseen = ~mask.any(-1)[..., None, None], ~mask.any(-2)[..., None, None]
    tensors = [q.masked_fill(idle, NAN), k.masked_fill(unseen, NAN), v.masked_fill(unseen, NAN)]
    options = {"scale": rng.choice([None, None, 0.3]), "d_lse": None}
    if rng.random() < 0.5:
        d_lse = torch.randn(q.transpose(-3, -2).shape[:-1], dtype=torch.float64).to(dtype)
        options["d_lse"] = d_lse.masked_fill(idle[..., 0].mT, NAN)
    return tensors, d_out.masked_fill(idle, NAN), options


@pytest.mark.parametrize(
    ("dtype", "layouts"), [(torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 8)], ids=lambda x: str(x)
)
@threads(1)
def test_any_layout_equals_dense_softmax(rng, dtype, layouts):
    """Small layouts of every builder and, since kernels work by blocks, larger ones; every gradient, of half of them
    that of the log-sum-exp too.

    The error budget is that of all of them together: of a handful of queries alone, luck makes too much of it.
    """
    exact = dict.fromkeys(("out", "lse", "d_v"), torch.float32)  # whatever the dtype
    kinds = {name: (torch.float32 if name == "lse" else dtype, exact.get(name, dtype)) for name in NAMES}
    found = {name: Quantity(name, *kinds[name]) for name in NAMES}
    worst = dict.fromkeys(NAMES, "")
    for builder, number in itertools.product(BUILDERS, range(layouts)):
        layout = BUILDERS[builder](rng, (30, 70) if number % 4 == 0 else (1, 3, 12))
        spans, mask = layout.spans, layout.spans.to_dense()
        tensors, d_out, options = drawn_call(rng, layout, dtype)
        ours = evaluate(span_attention, tensors, d_out, spans, backend="cpu", **options)
        truth = evaluate(dense_attention, [x.double() for x in tensors], d_out, mask, **options)
        eager = evaluate(plain_span_attention, tensors, d_out, spans, **options)
        if dtype != torch.float32:
            wide = [x.float() for x in tensors]
            in_float32 = evaluate(plain_span_attention, wide, d_out, spans, rounding=dtype, **options)
            eager = [x if name in exact else y for name, x, y in zip(NAMES, in_float32, eager, strict=True)]
        for name, *values in zip(NAMES, ours, eager, truth, strict=True):
            before = found[name].error, found[name].complaint
            found[name].add(*values)
            if (found[name].error, found[name].complaint) != before:
                worst[name] = f"{builder}, layout {number}, {spans}, {options['scale']}, {options['d_lse'] is None}"
    failures = [f"{failure} ({worst[name]})" for name, x in found.items() if (failure := x.failure())]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("builder", BUILDERS)
@threads(1)
def test_reference_equals_dense_softmax(rng, builder):
    for _ in range(3):
        layout = BUILDERS[builder](rng)
        tensors, d_out, options = drawn_call(rng, layout, torch.float64)
        options["softcap"] = rng.choice([None, 5.0])
        if rng.random() < 0.5:
            tensors.append(torch.randn(tensors[0].shape[-2], dtype=torch.float64))  # sinks
            options["d_lse"] = None if options["d_lse"] is None else options["d_lse"].nan_to_num(0.7)
        ours = evaluate(span_attention, tensors, d_out, layout.spans, backend="reference", **options)
        truth = evaluate(dense_attention, tensors, d_out, layout.oracle(), **options)
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reference_gradients_are_those_of_the_result(softcap):
    spans = RowSpans(int32([[0, 0, 2, 5, 1], [2, 3, 4, 5, 9]]), int32([[1, 2, 2, 5, 4], [4, 5, 6, 5, 7]]), 6)
    tensors = [*inputs(spans, (4, 2), (3, 2), torch.float64), torch.randn(4, dtype=torch.float64, requires_grad=True)]

    def call(q, k, v, sinks=None):
        out, lse = span_attention(
            q, k, v, spans, scale=0.7, softcap=softcap, sinks=sinks, return_lse=True, backend="reference"
        )
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(call, tensors[:3])
    assert torch.autograd.gradcheck(call, tensors)


def test_log_sum_exp_is_the_natural_one_of_the_scaled_and_capped_scores(backend):
    q, k, v = inputs(RowSpans.full(3, 5), (2, 1), (8, 4))
    spans = RowSpans(int32([0, 1, 4]), int32([5, 2, 4]), 5)
    out, lse = span_attention(q, k, v, spans, scale=0.5, softcap=3.0, return_lse=True, backend=backend)
    scores = 3 * torch.tanh(torch.einsum("ihd,jd->hij", q, k[:, 0]) * 0.5 / 3)
    want = torch.stack([scores[:, 0].logsumexp(-1), scores[:, 1, 1], torch.full((2,), -torch.inf)], -1)
    torch.testing.assert_close(lse, want.detach())
    assert lse.shape == (2, 3) and lse.dtype == torch.float32 and out.requires_grad and lse.requires_grad
    assert torch.equal(out, span_attention(q, k, v, spans, scale=0.5, softcap=3.0, backend=backend))
    half = [x.detach().half()[None] for x in (q, k, v)]
    out, lse = span_attention(*half, spans, return_lse=True, backend=backend)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((1, 3, 2, 4), torch.float16, (1, 2, 3), torch.float32)


# ---- documents are kept apart ----------------------------------------------------------------------------------------

LENGTHS, LENGTHS_K = (9, 50, 0, 17, 30), (20, 5, 7, 60, 34)
CU, CU_K = (torch.tensor(lengths).cumsum(0).tolist() for lengths in (LENGTHS, LENGTHS_K))
CU, CU_K = int32([0, *CU]), int32([0, *CU_K])
TOKENS = sum(LENGTHS)
IMAGE_ID = torch.arange(TOKENS) // 11 % 3 - 1
ISOLATED = {
    "packed": RowSpans.packed(CU),
    "causal": RowSpans.packed(CU, causal=True),
    "window": RowSpans.packed(CU, causal=True, window=8),
    "keys of their own": RowSpans.packed(CU, CU_K),
    "images": RowSpans.image_text(CU, IMAGE_ID),
    "prefix": RowSpans.prefix_lm(CU, int32([3, 40, 0, 9, 30])),
    "two runs": RowSpans(  # the first and the last third of each document
        *(torch.stack([CU[:-1], CU[1:] - int32(LENGTHS) // 3]).repeat_interleave(int32(LENGTHS), 1),),
        torch.stack([CU[:-1] + int32(LENGTHS) // 3, CU[1:]]).repeat_interleave(int32(LENGTHS), 1),
        TOKENS,
    ),
}


@pytest.mark.parametrize("bad", [NAN, torch.inf])
@pytest.mark.parametrize("layout", ISOLATED)
@threads(1)
def test_a_document_of_nan_spoils_no_other(backend, layout, bad):
    """To the bit, whichever tensor holds it; and the document itself does not hide it."""
    spans = ISOLATED[layout]
    tensors = [x.detach() for x in inputs(spans, (4, 2))]
    d_out = torch.randn_like(tensors[0])
    clean = evaluate(span_attention, tensors, d_out, spans, backend=backend)
    own_keys = spans.num_keys != TOKENS
    for document in (1, 3) if backend == "cpu" else (1,):
        queries = torch.arange(int(CU[document]), int(CU[document + 1]))
        keys = torch.arange(int(CU_K[document]), int(CU_K[document + 1])) if own_keys else queries
        for at, name in enumerate(("q", "k", "v", "d_out")):
            spoilt = [x.clone() for x in (*tensors, d_out)]
            spoilt[at][queries if name in ("q", "d_out") else keys] = bad
            found = evaluate(span_attention, spoilt[:3], spoilt[3], spans, backend=backend)
            for result, (value, expected) in zip(NAMES, zip(found, clean, strict=True), strict=True):
                axis = 1 if result == "lse" else 0
                mine = keys if result in ("d_k", "d_v") else queries
                rest = torch.ones(value.shape[axis], dtype=torch.bool).index_fill(0, mine, False)
                rest = rest.nonzero()[:, 0]
                assert torch.equal(value.index_select(axis, rest), expected.index_select(axis, rest)), (name, result)
            if name == "v":
                assert not found[0][queries].isfinite().all(-1).any()


def test_nothing_beyond_the_last_document_is_read(backend):
    """Padding of queries and of keys, without any document too."""
    for lengths in ((7, 40), (0, 0), ()):
        used, cu_seqlens = sum(lengths), int32([sum(lengths[:n]) for n in range(len(lengths) + 1)])
        tokens = used + 30
        spans = RowSpans.packed(cu_seqlens, num_queries=tokens, num_keys=tokens, causal=True)
        tensors = [x.detach() for x in inputs(spans)]
        for x in tensors:
            x[used:] = NAN
        d_out = torch.randn_like(tensors[0])
        d_out[used:] = NAN
        out, lse, *grads = evaluate(span_attention, tensors, d_out, spans, backend=backend)
        for x in (out, *grads):
            assert not x[used:].any() and x.isfinite().all()
        assert (lse[:, used:] == -torch.inf).all() and lse[:, :used].isfinite().all()


# ---- to the bit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", [RowSpans.packed(int32([0, 700, 705, 1100]), causal=True), RowSpans.full(2, 3000)])
def test_the_same_bits_on_any_number_of_threads(spans, dtype):
    """Of work enough for all of them: many queries, and many keys for few."""
    tensors = [x.detach() for x in inputs(spans, (4, 2), (64, 64), dtype)]
    d_out = torch.randn_like(tensors[0])
    with threads(1):
        first = evaluate(span_attention, tensors, d_out, spans, backend="cpu")
    for count in (1, 2, 3, 5):
        with threads(count):
            again = evaluate(span_attention, tensors, d_out, spans, backend="cpu")
        assert all(map(torch.equal, again, first)), count


def test_only_the_gradients_asked_for(backend):
    spans = RowSpans.packed(int32([0, 5, 17]), causal=True)
    tensors, d_out = inputs(spans, (4, 2)), torch.randn(17, 4, 16)
    every = torch.autograd.grad(span_attention(*tensors, spans, backend=backend), tensors, d_out)
    for needed in ((0,), (1,), (2,), (0, 2)):
        some = [x.detach().requires_grad_(n in needed) for n, x in enumerate(tensors)]
        span_attention(*some, spans, backend=backend).backward(d_out)
        for n, x in enumerate(some):
            assert torch.equal(x.grad, every[n]) if n in needed else x.grad is None
    with torch.no_grad():
        assert not span_attention(*tensors, spans, backend=backend).requires_grad


def test_no_cap_is_one_of_infinity(backend):
    spans = RowSpans.full(3, 3)
    tensors = inputs(spans)
    found, expected = (span_attention(*tensors, spans, softcap=x, backend=backend) for x in (torch.inf, None))
    assert torch.equal(found, expected)


# ---- memory ----------------------------------------------------------------------------------------------------------


def operations(function) -> set[str]:
    """The torch operations that run, those inside of the op too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.name for event in profile.events() if event.name.startswith("aten::")}


def views(memory: str, heads: tuple[int, int], tokens: int, dim: int) -> list[Tensor]:
    """q, k, v as parts of larger tensors."""
    q_heads, kv_heads = heads
    if memory == "fused qkv":
        fused = torch.randn(tokens, (q_heads + 2 * kv_heads) * dim)
        parts = fused.split([q_heads * dim, kv_heads * dim, kv_heads * dim], -1)
        return [x.unflatten(-1, (-1, dim)) for x in parts]
    if memory == "heads first":
        return [torch.randn(2, h, tokens, dim).transpose(1, 2) for h in (q_heads, kv_heads, kv_heads)]
    cache = torch.randn(2, 2, kv_heads, 4 * tokens, dim)  # (k or v, batch, heads, length, dim): half of it is filled
    return [torch.randn(2, tokens, q_heads, dim), *(x.transpose(1, 2)[:, : 2 * tokens] for x in cache)]


@pytest.mark.parametrize("memory", ["fused qkv", "heads first", "cache"])
def test_views_are_read_where_they_lie(memory):
    tensors = views(memory, (4, 2), 40, 24)
    assert not any(x.is_contiguous() for x in tensors[1:])
    spans = RowSpans.packed(int32([0, 40]), int32([0, tensors[1].shape[-3]]), causal=True)
    d_out = torch.randn(tensors[0].shape)
    copied = evaluate(span_attention, [x.contiguous() for x in tensors], d_out, spans, backend="cpu")
    found = evaluate(span_attention, tensors, d_out, spans, backend="cpu")
    assert all(map(torch.equal, found, copied))
    leaves = [x.detach().requires_grad_() for x in tensors]
    ran = operations(lambda: torch.autograd.grad(span_attention(*leaves, spans, backend="cpu"), leaves, d_out))
    assert {"aten::new_empty", "aten::empty_like"} <= ran  # it does see what runs inside of the op
    assert not ran & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"}


def test_memory_is_not_that_of_a_mask():
    """Forward and backward of 6000 x 6000 pairs allocate no more than some tensors of the inputs' size."""
    tokens, width = 6000, 16
    tensors, d_out = torch.randn(3, tokens, 1, width).unbind(), torch.randn(tokens, 1, width)
    spans = RowSpans.packed(int32([0, tokens]), causal=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        evaluate(span_attention, list(tensors), d_out, spans, backend="cpu")
    allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
    assert 0 < allocated < 20 * tensors[0].nbytes


# ---- compiled, exported, cast ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, batch", [((2, 2), 1), ((4, 2), 2)])
def test_opcheck(backend, heads, batch):
    spans = RowSpans.packed(int32([0, 5, 5, 9]), num_queries=12, causal=True)
    q, k, v = (x.detach() for x in inputs(spans, heads, (8, 6), batch=batch))
    lo, hi = spans.lo[None, None], spans.hi[None, None]
    ops, call = torch.ops.mmkernels, (0.3, 2.0, backend)
    bare = lo, hi, None, None, None, False, None
    own_keys = RowSpans.packed(int32([0, 5, 5, 9]), int32([0, 2, 3, 7]), num_keys=12, causal=True, window=4)
    torch.library.opcheck(ops.span_attention, (q, k, v, *bare, *call))
    for documents in (spans.documents(), own_keys.documents()):
        torch.library.opcheck(ops.span_attention, (q, k, v, lo, hi, spans.hulls(), *documents, *call))
    out, lse = ops.span_attention(q, k, v, *bare, *call)
    backward = torch.randn_like(out), q, k, v, out, lse
    for d_lse in (None, torch.randn(lse.mT.shape).mT):
        torch.library.opcheck(ops.span_attention_backward, (*backward, d_lse, *bare, *call))
    torch.library.opcheck(ops.span_attention_backward, (*backward, None, lo, hi, None, *own_keys.documents(), *call))


def test_compiles_whole_and_once_whatever_the_layout(backend):
    """Lengths, documents, sizes: spans built inside or given, of one run or several; with gradients."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(q, k, v, cu_seqlens, image_id, spans):
        own = RowSpans.image_text(cu_seqlens, image_id, window=9)
        out, lse = span_attention(q, k, v, own, return_lse=True, backend=backend)
        return out + span_attention(q, k, v, spans, softcap=4.0, backend=backend), lse

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for lengths, runs in (((5, 9, 4), 2), ((11, 2), 3), ((3, 8, 13, 1), 5)):
        tokens = sum(lengths)
        cu_seqlens = int32([sum(lengths[:n]) for n in range(len(lengths) + 1)])
        lo, hi = torch.randint(0, tokens, (2, runs, tokens), dtype=torch.int32).sort(0).values
        spans = RowSpans(lo.clone(), hi.clone(), tokens)  # views of one tensor would be guarded as such
        tensors = inputs(spans, (12, 6), (8, 8))  # no two sizes alike, which would be taken for one
        arguments = (*tensors, cu_seqlens, torch.arange(tokens) // 3 % 3 - 1, spans)
        (ours, lse), (want, want_lse) = compiled(*arguments), step(*arguments)
        torch.testing.assert_close((ours, lse), (want, want_lse))
        fed = torch.randn_like(want), torch.randn_like(want_lse)
        found, expected = (torch.autograd.grad(x, tensors, fed) for x in ((ours, lse), (want, want_lse)))
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


def test_a_new_layout_of_the_same_sizes_compiles_nothing(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, spans: span_attention(q, k, v, spans, backend=backend),
        backend=counter,
        fullgraph=True,
        dynamic=False,
    )
    for cut in (4, 9, 0, 12):
        spans = RowSpans.packed(int32([0, cut, 12]), causal=True)
        tensors = inputs(spans)
        torch.testing.assert_close(compiled(*tensors, spans), span_attention(*tensors, spans, backend=backend))
    assert counter.frame_count == 1


class Block(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.qkv, self.backend = torch.nn.Linear(12, 36), backend

    def forward(self, x, spans):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).unbind(-3)
        return span_attention(q, k, v, spans, backend=self.backend).flatten(-2)


def test_exports_with_spans_as_inputs(backend):
    def call(length):
        return torch.randn(length, 12), RowSpans.packed(int32([0, 3, length]), causal=True)

    block, dynamic = Block(backend), torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic}, [{0: dynamic}, {0: dynamic}, dynamic])
    exported = torch.export.export(block, call(9), dynamic_shapes=shapes)
    for length in (9, 20, 5):
        x, spans = call(length)
        torch.testing.assert_close(exported.module()(x, spans), block(x, spans))


def test_autocast_gives_its_dtype(backend):
    spans = RowSpans.packed(int32([0, 6, 20]), causal=True)
    tensors = inputs(spans)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = span_attention(*tensors, spans, return_lse=True, backend=backend)
    half = span_attention(*(x.bfloat16() for x in tensors), spans, return_lse=True, backend=backend)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, half[0]) and torch.equal(lse, half[1])
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.sum(), tensors))


# ---- errors ----------------------------------------------------------------------------------------------------------

Q, K = torch.zeros(4, 8, 16), torch.zeros(6, 2, 16)
S, B = RowSpans.full(4, 6), RowSpans(*torch.zeros(2, 3, 1, 4, dtype=torch.int32), 6)
ERRORS = [
    ((Q.tolist(), K, K, S), {}, TypeError, "q must be a torch.Tensor, got list"),
    ((Q.int(), K, K, S), {}, TypeError, "q has dtype torch.int32; accepted are float32"),
    ((Q, K.int(), K, S), {}, TypeError, "k has dtype torch.int32"),
    ((Q, K, [1.0], S), {}, TypeError, "v must be a torch.Tensor, got list"),
    ((Q, K.bfloat16(), K, S), {}, TypeError, "k has dtype torch.bfloat16, q torch.float32; cast one to the other's"),
    ((Q, K, K.double(), S), {}, TypeError, "v has dtype torch.float64, q torch.float32"),
    ((Q, K.to("meta"), K, S), {}, ValueError, "k is on meta, q on cpu; move one to the other's"),
    ((Q, K, K.to("meta"), S), {}, ValueError, "v is on meta, q on cpu"),
    ((Q[0], K, K, S), {}, ValueError, r"q has shape (8, 16); it must be (Tq, Hq, D) or (B, Tq, Hq, D)"),
    ((Q, K[None], K, S), {}, ValueError, r"k has shape (1, 6, 2, 16), q (4, 8, 16); k must be (Tk, Hkv, D) beside it"),
    ((Q[None], K[None], K, S), {}, ValueError, r"v has shape (6, 2, 16), q (1, 4, 8, 16); v must be (B, Tk, Hkv, D)"),
    ((Q, K, K[:5], S), {}, ValueError, r"k has shape (6, 2, 16), v (5, 2, 16); they must be equal but for the last"),
    ((Q, K, K[:, :1], S), {}, ValueError, r"k has shape (6, 2, 16), v (6, 1, 16); they must be equal but for the last"),
    ((Q, K[..., :8], K, S), {}, ValueError, "k has heads of 8 numbers, q of 16; they must be equal"),
    ((Q[:, :3], K, K, S), {}, ValueError, "k has 2 heads, q has 3; the number of query heads must be a multiple"),
    ((Q[:, :1], K, K, S), {}, ValueError, "k has 2 heads, q has 1; the number of query heads must be a multiple"),
    ((Q[:, :0], K, K, S), {}, ValueError, r"q has shape (4, 0, 16); it needs at least one head of one number"),
    ((Q, K[:, :0], K[:, :0], S), {}, ValueError, r"k has shape (6, 0, 16); it needs at least one head"),
    ((Q, K, K[..., :0], S), {}, ValueError, r"v has shape (6, 2, 0); it needs at least one head of one number"),
    ((Q[..., ::2], K[..., :8], K, S), {}, ValueError, r"q has strides (128, 16, 2); the last must be 1: call q.contig"),
    ((Q, K, K.mT.contiguous().mT, S), {}, ValueError, r"v has strides (32, 1, 2); the last must be 1: call v.contig"),
    ((Q[None], *K.expand(2, 2, 6, 2, 16), S), {}, ValueError, "q has a batch of 1, k and v of 2; they must be equal"),
    ((Q, K, K, S.lo), {}, TypeError, "spans must be a mmkernels.RowSpans, got Tensor"),
    ((Q, K, K, S.to("meta")), {}, ValueError, "spans are on meta, q on cpu; move them with spans.to(...)"),
    ((Q, K, K, RowSpans.full(5, 6)), {}, ValueError, "spans are for 5 queries, q has 4"),
    ((Q, K, K, RowSpans.full(4, 5)), {}, ValueError, "spans are for 5 keys, k has 6"),
    ((Q, K, K, B), {}, ValueError, "spans have a batch of 3, q has none; they must be equal"),
    ((Q[None], K[None], K[None], B), {}, ValueError, "spans have a batch of 3, q has 1; they must be equal"),
    ((Q, K, K, S), {"sinks": [0.0] * 8}, TypeError, "sinks must be a torch.Tensor, got list"),
    ((Q, K, K, S), {"sinks": Q[0, :, 0].int()}, TypeError, "sinks has dtype torch.int32; accepted are float32"),
    ((Q, K, K, S), {"sinks": Q[0, :2, 0]}, ValueError, "sinks has shape (2,), q 8 heads; sinks must be (8,), one for"),
    ((Q, K, K, S), {"sinks": Q[0, :, :1]}, ValueError, "sinks has shape (8, 1), q 8 heads; sinks must be (8,)"),
    ((Q, K, K, S), {"sinks": Q[0, :, 0].to("meta")}, ValueError, "sinks is on meta, q on cpu; move one to the other's"),
    ((Q, K, K, S), {"softcap": 0.0}, ValueError, "softcap is 0.0; it must be positive, or None for none"),
    ((Q, K, K, S), {"softcap": -1}, ValueError, "softcap is -1; it must be positive"),
    ((Q, K, K, S), {"softcap": NAN}, ValueError, "softcap is nan; it must be positive"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS, ids=[case[-1][:40] for case in ERRORS])
def test_errors_name_the_argument(args, options, kind, message):
    with pytest.raises(kind, match=re.escape(f"span_attention: {message}")):
        span_attention(*args, **options)
