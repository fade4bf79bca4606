"""The backend "flash-attn" without a GPU: everything but the kernels, which are doubles.

flash-attn runs on NVIDIA's GPUs alone, so that on a CPU plain PyTorch stands in for its kernels, and keeps the
conventions it documents: rows that belong to no document stay unwritten, a query without keys has an lse of +inf (of
-inf in flash-attn 3), causal documents are aligned at their ends, and a tile multiplies whatever it reaches by a weight
of 0. The double stands where the kernels do, behind each provider's own operator or module, with the names and the
order that these declare. So what is proven here is what surrounds the kernels; that they do what their double does is
for a GPU to prove: `mmkernels check --backend flash-attn`.
"""

import importlib
import inspect
import itertools
import sys
from types import ModuleType

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import mmkernels
from mmkernels import RowSpans, backends, span_attention
from mmkernels.check import run_case, select
from mmkernels.check.budget import Quantity
from mmkernels.ops import _flash_attn
from mmkernels.ops.span_attention import flash_attn
from mmkernels.ops.span_attention.params import Params
from mmkernels.spans import Documents

HALVES = (torch.bfloat16, torch.float16)


class Kernels:
    """What stands in for flash-attn: dense softmax, one document at a time, in the conventions above."""

    def __init__(self, tile: int, lse_of_nothing: float):
        self.tile = tile  # rows are read up to a multiple of it, beyond the end of a document
        self.lse_of_nothing = lse_of_nothing
        self.calls = 0

    def forward(self, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap):
        self.check(q, k, v, cu_q, cu_k, max_q, max_k, causal, left, right)
        out, lse = torch.full_like(q, torch.nan), q.new_full(q.shape[1::-1], torch.nan, dtype=torch.float32)
        for own, keys, reached in self.documents(cu_q, cu_k, len(q), len(k)):
            scores, mask, _ = self.scores(q[own[0]], k[keys], own, keys, reached, scale, left, right, softcap)
            own_lse = scores.logsumexp(-1)
            weights = torch.where(mask, (scores - own_lse[..., None]).exp(), 0.0)
            out[own[0]] = torch.einsum("hij,jhd->ihd", weights, self.expand(v[keys], q)).to(q.dtype)
            lse[:, own[0]] = own_lse.masked_fill(own_lse == -torch.inf, self.lse_of_nothing)
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap):
        self.check(q, k, v, cu_q, cu_k, max_q, max_k, causal, left, right)
        assert d_out.shape == out.shape == q.shape and lse.shape == q.shape[1::-1] and lse.is_contiguous()
        grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        for own, keys, reached in self.documents(cu_q, cu_k, len(q), len(k)):
            rows = own[1]
            scores, _, slope = self.scores(q[rows], k[keys], own, keys, reached, scale, left, right, softcap, rows)
            inside = torch.arange(len(rows)) < len(own[0])
            own_lse = torch.where(inside, lse[:, rows], torch.inf)  # of the rows beyond the end
            weights = (scores - own_lse[..., None]).exp()  # no mask but that of the scores: an lse of -inf gives NaN
            d_o, o, qs = d_out[rows].float(), out[rows].float(), q[rows].float()
            values, wide = self.expand(v[keys], q), self.expand(k[keys], q)
            delta = (d_o * o).sum(-1).T.masked_fill(~inside, 0.0)
            d_scores = weights * (torch.einsum("ihd,jhd->hij", d_o, values) - delta[..., None]) * slope * scale
            mine = torch.arange(len(keys)) < reached
            grads[0][own[0]] = torch.einsum("hij,jhd->ihd", d_scores, wide)[: len(own[0])].to(q.dtype)
            for grad, sums in ((grads[1], (d_scores, qs)), (grads[2], (weights, d_o))):
                full = torch.einsum("hij,ihd->jhd", *sums).unflatten(1, (k.shape[1], -1)).sum(2)
                grad[keys[mine]] = full[mine].to(q.dtype)
        return grads

    def check(self, q, k, v, cu_q, cu_k, max_q, max_k, causal, left, right) -> None:
        """What flash-attn refuses, and what it takes on trust."""
        self.calls += 1
        for x in (q, k, v):
            assert x.dim() == 3 and x.stride(-1) == 1 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256
            assert x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in x.stride()[:2])
        assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0 and max_q > 1 and max_k > 0
        assert causal == (left < 0 and right == 0) and right in (-1, 0) and (right == 0 or left == -1)
        for offsets, longest, tokens in ((cu_q, max_q, len(q)), (cu_k, max_k, len(k))):
            assert offsets.dtype == torch.int32 and offsets.is_contiguous() and len(offsets) == len(cu_q) > 1
            assert offsets.min() >= 0 and offsets.max() <= tokens and offsets.diff().max() <= longest

    def documents(self, cu_q, cu_k, queries, keys):
        """((its queries, those and what their tiles reach), the keys that tiles reach, its keys' number)."""
        for (a, b), (c, d) in zip(*(itertools.pairwise(x.tolist()) for x in (cu_q, cu_k)), strict=True):
            rows = torch.arange(a, min(queries, a + -(-(b - a) // self.tile) * self.tile))
            reached = torch.arange(c, min(keys, c + -(-(d - c) // self.tile) * self.tile))
            yield (torch.arange(a, b), rows), reached, d - c

    def scores(self, q, k, own, keys, reached, scale, left, right, softcap, rows=None):
        i = torch.arange(len(own[0] if rows is None else rows))[:, None] + reached - len(own[0])
        j = torch.arange(len(keys))
        mask = j < reached
        mask = mask & (j <= i) if right == 0 else mask.expand(len(i), -1)
        mask = mask & (i - j <= left) if left >= 0 else mask
        products, slope = torch.einsum("ihd,jhd->hij", q.float(), self.expand(k, q)) * scale, 1.0
        if softcap:
            capped = (products / softcap).tanh()
            products, slope = softcap * capped, 1 - capped * capped
        return products.masked_fill(~mask, -torch.inf), mask, slope

    def expand(self, x: Tensor, q: Tensor) -> Tensor:
        return x.float().repeat_interleave(q.shape[1] // x.shape[1], 1)


def flash_attn_2(kernels: Kernels) -> dict[str, ModuleType]:
    """The two functions as flash_attn 2.7 and 2.8 name their arguments."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert dropout_p == 0 and alibi_slopes is None
        for x in (q, k, v):
            torch.autograd.graph.increment_version(x)  # as 2.7 declares
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        window = window_size_left, window_size_right
        return *kernels.forward(q, k, v, *lengths, softmax_scale, causal, *window, softcap), torch.empty(0), None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert deterministic and dropout_p == 0 and alibi_slopes is None
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        tensors, window = (dout, q, k, v, out, softmax_lse), (window_size_left, window_size_right)
        found = kernels.backward(*tensors, *lengths, softmax_scale, causal, *window, softcap)
        for grad, value in zip((dq, dk, dv), found, strict=True):
            grad.copy_(value)
        return torch.empty(0)

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__version__ = "2.8.3"
    package.__path__ = []
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def flash_attn_3(kernels: Kernels) -> torch.library.Library:
    """The two operators as flash-attn 3 declares them."""
    library = torch.library.Library("flash_attn_3", "DEF")
    before = "Tensor? k_new = None, Tensor? v_new = None, Tensor? q_v = None, Tensor? out = None, "
    before += "Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? cu_seqlens_k_new = None, "
    before += "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
    before += "Tensor? page_table = None, Tensor? scheduler_metadata = None"
    window = "float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, "
    window += "int window_size_right = -1"
    library.define(
        f"fwd(Tensor q, Tensor k, Tensor v, {before}, {window}, int attention_chunk = 0, float softcap = 0.0, "
        "int num_splits = 0, bool? pack_gqa = None, int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    library.define(
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq = None, "
        "Tensor(b!)? dk = None, Tensor(c!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
        "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
        f"{window}, float softcap = 0.0, bool deterministic = False, int sm_margin = 0) -> Tensor"
    )

    def named(name: str, values: tuple) -> dict[str, object]:
        arguments = getattr(torch.ops.flash_attn_3, name).default._schema.arguments
        return {x.name: x.default_value for x in arguments} | dict(zip((x.name for x in arguments), values))  # noqa: B905

    def call(x: dict[str, object]) -> list[object]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "is_causal")
        return [x[name] for name in (*names, "window_size_left", "window_size_right", "softcap")]

    def forward(*values):
        x = named("fwd", values)
        assert x["num_splits"] == 1
        nothing = x["q"].new_empty(0)
        return *kernels.forward(x["q"], x["k"], x["v"], *call(x)), nothing, nothing

    def backward(*values):
        x = named("bwd", values)
        assert x["deterministic"]
        found = kernels.backward(*(x[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse")), *call(x))
        for name, value in zip(("dq", "dk", "dv"), found, strict=True):
            x[name].copy_(value)
        return x["q"].new_empty(0)

    library.impl("fwd", forward, "CPU")
    library.impl("bwd", backward, "CPU")
    return library


def torch_varlen(kernels: Kernels) -> torch.library.Library:
    """Behind torch's own operators, whose schemas are the real ones."""
    library = torch.library.Library("aten", "IMPL")

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
                window_size_left=None, window_size_right=None, **others):  # fmt: skip
        assert not dropout_p and not return_debug_mask and not any(x is not None for x in others.values())
        window = window_size_left, window_size_right
        found = kernels.forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, is_causal, *window, 0.0)
        return *found, *(q.new_empty(0) for _ in range(3))

    def backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *,
                 scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled() and not dropout_p
        lengths, window = (cu_q, cu_k, max_q, max_k), (window_size_left, window_size_right)
        return tuple(kernels.backward(d_out, q, k, v, out, lse, *lengths, scale, is_causal, *window, 0.0))

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    return library


@pytest.fixture
def on_cpu(monkeypatch):
    """As if this CPU were a GPU of Hopper."""
    missing = backends.missing
    monkeypatch.setattr(backends, "missing", lambda name: None if name == "flash-attn" else missing(name))
    monkeypatch.setattr(_flash_attn, "DEVICE", "cpu")
    monkeypatch.setattr(_flash_attn, "capability", lambda device: (9, 0))


@pytest.fixture(params=["flash-attn 3", "flash-attn 2", "torch's own"])
def kernels(request, monkeypatch, on_cpu):
    """The double, behind one of the providers, and no other there."""
    (chosen,) = (each for each in _flash_attn.PROVIDERS if each.name == request.param)
    monkeypatch.setattr(_flash_attn, "PROVIDERS", (chosen,))
    monkeypatch.setattr(_flash_attn, "_missing", lambda each: None)
    double = Kernels(16, -torch.inf) if request.param == "flash-attn 3" else Kernels(1, torch.inf)
    library = None
    if request.param == "flash-attn 2":
        for name, module in flash_attn_2(double).items():
            monkeypatch.setitem(sys.modules, name, module)
        _flash_attn._import.cache_clear()
    else:
        library = (flash_attn_3 if request.param == "flash-attn 3" else torch_varlen)(double)
    yield double
    _flash_attn._import.cache_clear()
    if library is not None:
        library._destroy()


# ---- around the kernels ----------------------------------------------------------------------------------------------

CASES = [(case, dtype) for case, dtype in select(op="span_attention") if dtype in HALVES]
CASES = [(case, dtype) for case, dtype in CASES if dtype == torch.bfloat16 or case.quick]
# What spans other than those of documents, odd heads, a negative scale and values of another width are told.
REASONS = ("keep no documents", "a multiple of 8; those", "scales above 0", "values as wide", "it takes no softcap",
           "heads of up to 192")  # fmt: skip


def test_every_case_it_serves_meets_its_budget(kernels, seed):
    """The suite that the GPU runs: padding of NaN, poisoned results, odd addresses, GQA, batches, windows, softcap."""
    served, failures = 0, []
    strict = kernels.tile > 1  # what reads beyond its documents is checked on all cases, the others on the quick ones
    for case, dtype in (x for x in CASES if strict or x[0].quick):
        outcome = run_case(case, dtype, "flash-attn", "cpu", seed)
        failures += [f"{case.name}, {dtype}: {failure}" for failure in outcome.failures]
        served += outcome.unsupported is None
        assert outcome.passed or outcome.failures or any(reason in outcome.unsupported for reason in REASONS)
    assert not failures, "\n".join(failures)
    assert served > (50 if strict else 20) and kernels.calls > 2 * served


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def inputs(spans: RowSpans, heads=(2, 2), width=16, batch=()) -> list[Tensor]:
    shapes = (spans.num_queries, heads[0]), *[(spans.num_keys, heads[1])] * 2
    return [torch.randn(*batch, *shape, width).bfloat16().requires_grad_() for shape in shapes]


def agree(spans: RowSpans, tensors: list[Tensor]) -> None:
    """With the reference, forward and backward, within the budget that its own rounding gives."""
    upstream = torch.randn(*tensors[0].shape).bfloat16()
    d_lse = torch.randn(upstream.shape[:-1]).mT
    d_lse = d_lse.masked_fill(~spans.to_dense().any(-1), torch.nan)

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors] if dtype != torch.bfloat16 else tensors
        out, lse = span_attention(*leaves, spans, return_lse=True, backend=backend)
        alone = torch.autograd.grad(out, leaves, upstream.to(dtype), retain_graph=True)
        return [out, lse, *alone, *torch.autograd.grad((out, lse), leaves, (upstream.to(dtype), d_lse.to(lse)))]

    ours, plain = (results(backend, torch.bfloat16) for backend in ("flash-attn", "reference"))
    truth = results("reference", torch.float64)
    names = "out", "lse", "d_q", "d_k", "d_v", "d_q with d_lse", "d_k with d_lse", "d_v with d_lse"
    for name, mine, other, exact in zip(names, ours, plain, truth, strict=True):
        assert mine.is_contiguous()
        quantity = Quantity(name, mine.dtype, other.dtype)
        quantity.add(mine, other, exact)
        assert quantity.failure() is None, quantity.failure()


UNUSUAL = {
    "no documents": (RowSpans.packed(int32(0), num_queries=5), ()),
    "no queries": (RowSpans.full(0, 5), ()),
    "no keys": (RowSpans.full(5, 0), ()),
    "empty documents": (RowSpans.packed(int32(0, 0, 0), num_queries=4), ()),
    "one query in one of three": (RowSpans.packed(int32(0, 0, 1, 1), int32(0, 3, 8, 9)), ()),
    "one query a row": (RowSpans.full(1, 9), (3,)),
    "more queries than keys": (RowSpans.packed(int32(0, 9, 12), int32(0, 4, 6), causal=True), ()),
    "a window over a cache": (RowSpans.packed(int32(0, 2, 5), int32(0, 20, 40), causal=True, window=4), (2,)),
    "offsets beyond the tokens": (RowSpans.packed(int32(0, 5, 40), num_queries=12, causal=True), ()),
    "padded rows": (RowSpans.packed(int32(0, 5, 9), num_queries=12, causal=True), (3,)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_layouts(kernels, name):
    spans, batch = UNUSUAL[name]
    agree(spans, inputs(spans, (4, 2), batch=batch))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_gradient_of_the_log_sum_exp_is_not_rounded_to_half(dtype):
    """d_out and out in half precision hold it to float32's last digit, whatever its size, and NaN is NaN."""
    d_lse = torch.cat([torch.randn(50, 2) * 2.0 ** torch.randint(-30, 20, (50, 2)), torch.zeros(1, 2)])
    q, k = torch.zeros(51, 2, 8, dtype=dtype), torch.ones(40, 1, 8, dtype=dtype)
    d_out, _, _, v, out = flash_attn._of_lse(d_lse, q, k, k)
    assert d_out.dtype == out.dtype == dtype and not v.any() and d_out.isfinite().all() and out.isfinite().all()
    found = -(d_out.double() * out.double()).sum(-1)
    assert ((found - d_lse.double()).abs() <= d_lse.abs() * 2.0**-24 + 2.0**-38).all()
    d_out, *_, out = flash_attn._of_lse(torch.full((1, 1), torch.nan), q[:1, :1], k, k)
    assert (d_out * out).isnan().any()


def test_a_document_of_nan_spoils_no_other_unless_tiles_reach_it(kernels):
    """That the exception which the docstring makes for flash-attn 3 is one, and the only one."""
    spans = RowSpans.packed(int32(0, 9, 30), causal=True)
    q, k, v = (x.detach() for x in inputs(spans))
    v[9:] = torch.nan
    spoilt = span_attention(q, k, v, spans, backend="flash-attn")[:9].isnan().any()
    assert bool(spoilt) == (kernels.tile > 1)


def test_whoever_saved_the_queries_before_gets_a_gradient(kernels):
    """Flash-attn declares that it writes to q: no version of the caller's may count that."""
    spans = RowSpans.packed(int32(0, 9, 30), causal=True)
    q, k, v = inputs(spans)
    squashed = q.tanh()  # saves its result
    span_attention(squashed, k, v, spans, backend="flash-attn").sum().backward()
    assert q.grad is not None


def test_torchs_switches_are_left_as_they_were(kernels):
    spans = RowSpans.full(4, 4)
    tensors = inputs(spans)
    for on, warned, filling in ((False, False, True), (True, True, False), (True, False, True)):
        torch.use_deterministic_algorithms(on, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filling
        try:
            span_attention(*tensors, spans, backend="flash-attn").sum().backward()
            assert torch.are_deterministic_algorithms_enabled() == on
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warned
            assert torch.utils.deterministic.fill_uninitialized_memory == filling
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True


def test_compiles_whole_and_once_whatever_the_documents(kernels):
    """Spans made inside and spans given, with a window that the graph holds; lengths and documents change."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(q, k, v, cu_seqlens, spans):
        own = RowSpans.packed(cu_seqlens, num_queries=q.shape[0], causal=True, window=9)
        out = span_attention(q, k, v, own, backend="flash-attn")
        out = out + span_attention(q, k, v, RowSpans.full(q.shape[0], k.shape[0]), backend="flash-attn")
        return out + span_attention(q, k, v, spans, backend="flash-attn")

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ((5, 9, 4), (11, 2), (3, 8, 13, 1)):
        cu_seqlens = int32(0, *itertools.accumulate(lengths))
        spans = RowSpans.packed(cu_seqlens, causal=True)
        arguments = *inputs(spans, (12, 6)), cu_seqlens.clone(), spans
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert counter.frame_count == 1


# ---- which provider, and why not -------------------------------------------------------------------------------------


def q_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(1, *shape, dtype=dtype)


DOCUMENTS = RowSpans.full(4, 4).documents()


def params_of(documents: Documents | None, scale: float = 1.0, softcap: float = 0.0) -> Params:
    return Params(*RowSpans.full(4, 4).with_axes(), None, documents, scale, softcap)


@pytest.mark.parametrize(
    ("q", "v", "call", "reason"),
    [
        (q_of(4, 2, 64, dtype=torch.float32), None, (DOCUMENTS,), "q of bfloat16, float16, not torch.float32"),
        (q_of(4, 2, 60), None, (DOCUMENTS,), "up to 256 numbers, a multiple of 8; those of q have 60"),
        (q_of(4, 2, 264), None, (DOCUMENTS,), "those of q have 264"),
        (q_of(4, 2, 64), q_of(4, 2, 40), (DOCUMENTS,), "those of v have 40 numbers, those of k 64"),
        (q_of(4, 2, 64), None, (None,), "RowSpans.packed or RowSpans.full made, and these keep no documents"),
        (q_of(4, 2, 64), None, (DOCUMENTS, -0.5), "it serves scales above 0, not -0.5"),
    ],
)
def test_what_it_cannot_express_is_told(on_cpu, q, v, call, reason):
    assert reason in flash_attn.unsupported(q, q, q if v is None else v, params_of(*call))


def test_it_serves_a_gpu_of_ampere_or_later(monkeypatch, on_cpu):
    q = q_of(4, 2, 64)
    monkeypatch.setattr(_flash_attn, "_missing", lambda each: None)
    assert flash_attn.unsupported(q, q, q, params_of(DOCUMENTS)) is None
    monkeypatch.setattr(_flash_attn, "capability", lambda device: (7, 5))
    assert flash_attn.unsupported(q, q, q, params_of(DOCUMENTS)) == "cpu is sm_75; flash-attn needs sm_80 or later"
    monkeypatch.setattr(_flash_attn, "DEVICE", "cuda")
    assert flash_attn.unsupported(q, q, q, params_of(DOCUMENTS)) == "it serves tensors on cuda, q is on cpu"


@pytest.mark.parametrize(
    ("there", "head", "softcap", "capability", "chosen"),
    [
        ("32t", 128, 0.0, (9, 0), "flash-attn 3"),
        ("32t", 256, 0.0, (9, 0), "flash-attn 2"),
        ("32t", 128, 0.0, (8, 0), "flash-attn 2"),
        ("3t", 128, 30.0, (9, 0), "flash-attn 3"),
        ("t", 256, 0.0, (9, 0), "torch's own"),
        (
            "t",
            128,
            30.0,
            (9, 0),
            "flash-attn 2: it is not here; torch's own: it takes no softcap",
        ),
        ("t", 256, 0.0, (8, 6), "torch's own: it is not for heads of 256 numbers on sm_86"),
        ("3t", 256, 1.0, (9, 0), "flash-attn 3: its steady backward pass takes heads of up to 192 numbers"),
        ("3t", 64, 1.0, (10, 0), "flash-attn 3: it is for Hopper; flash-attn 2: it is not here; torch's own: it takes"),
    ],
)
def test_the_first_provider_that_serves_the_call_is_taken(
    monkeypatch, on_cpu, there, head, softcap, capability, chosen
):
    names = dict(zip("32t", (each.name for each in _flash_attn.PROVIDERS), strict=True))
    here = [names[letter] for letter in there]
    monkeypatch.setattr(_flash_attn, "_missing", lambda each: None if each.name in here else "it is not here")
    monkeypatch.setattr(_flash_attn, "capability", lambda device: capability)
    q = q_of(4, 2, head)
    reason = flash_attn.unsupported(q, q, q, params_of(DOCUMENTS, 0.1, softcap))
    if reason is None:
        assert _flash_attn.provider(head, softcap, q.device).name == chosen
    else:
        assert chosen in reason


def test_what_is_missing_here_is_told_with_what_mends_it(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA; mend: install one with, from pytorch.org" in _flash_attn.missing()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU; mend: look at nvidia-smi" in _flash_attn.missing()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_flash_attn, "_missing", lambda each: "it is not installed")
    told = "flash-attn 3: it is not installed; flash-attn 2: it is not installed; torch's own: it is not installed; "
    assert _flash_attn.missing() == told + "mend: pip install 'mmkernels[flash-attn]', or torch 2.10 or later"
    monkeypatch.setattr(_flash_attn, "_missing", lambda each: None)
    assert _flash_attn.missing() is None


def test_an_old_or_broken_flash_attn_is_told(monkeypatch, tmp_path):
    provider = _flash_attn.FlashAttn2()
    modules = flash_attn_2(Kernels(1, torch.inf))
    modules["flash_attn"].__version__ = "2.6.3"
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    _flash_attn._import.cache_clear()
    assert provider.missing() == "it is 2.6.3, and 2.7 is needed"
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for line, reason in (
        ("raise OSError('undefined symbol: _ZN2at')", "it does not load: undefined symbol: _ZN2at"),
        ("import einops_of_nobody", "it does not load: No module named 'einops_of_nobody'"),
        (None, "it is not installed"),  # as where only flash-attn 4 is, which shares the name of the package
    ):
        file = tmp_path / "flash_attn" / "flash_attn_interface.py"
        file.write_text(line) if line else file.unlink()
        importlib.invalidate_caches()
        _flash_attn._import.cache_clear()
        assert provider.missing() == reason
    _flash_attn._import.cache_clear()
    monkeypatch.delitem(sys.modules, "flash_attn")


def test_it_is_listed_and_never_chosen_unasked(on_cpu, monkeypatch):
    """Until a committed measurement of a GPU says that it should be."""
    monkeypatch.setattr(_flash_attn, "_missing", lambda each: None)
    spans = RowSpans.packed(int32(0, 5, 9), causal=True)
    q, k, v = inputs(spans)
    found = {each.backend: each for each in mmkernels.explain("span_attention", q, k, v, spans)}
    assert found["flash-attn"].reason is None and not found["flash-attn"].chosen
    assert all("flash-attn" not in order for order in backends.AUTO_ORDER.values())
    (chosen,) = (x for x in mmkernels.explain("span_attention", q, k, v, spans, backend="flash-attn") if x.chosen)
    assert chosen.backend == "flash-attn"
    with pytest.raises(mmkernels.BackendUnavailable, match="keep no documents"):
        span_attention(q, k, v, RowSpans(spans.lo, spans.hi, 9), backend="flash-attn")


def test_the_environment_names_it_too(kernels, monkeypatch):
    spans = RowSpans.full(4, 4)
    monkeypatch.setenv("MMKERNELS_BACKEND", "flash-attn")
    span_attention(*inputs(spans), spans)
    assert kernels.calls == 1


def test_torchs_varlen_attention_is_what_is_called_for():
    """Of the torch installed: the operators under its public function, the order of their arguments, and its window."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 brought it")
    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    forward, backward = (
        getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema for name in ("forward", "backward")
    )
    lengths, options = ["cum_seq_q", "cum_seq_k", "max_q", "max_k"], {"scale", "window_size_left", "window_size_right"}
    positional = [[x.name for x in schema.arguments if not x.kwarg_only] for schema in (forward, backward)]
    assert positional[0] == ["query", "key", "value", *lengths, "dropout_p", "is_causal", "return_debug_mask"]
    tensors = ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert positional[1] == [*tensors, *lengths, "dropout_p", "is_causal", "rng_state", "unused"]
    for schema in (forward, backward):
        assert options <= {x.name for x in schema.arguments if x.kwarg_only}
    assert [x.name for x in forward.returns[:2]] == ["output", "softmax_logsumexp"]
