"""The CUDA kernels of span attention's gradients in the emulator, against the reference in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from emulator_build import CSRC, compiled_by_nvcc, disassembled, needs_nvcc
from span_attention_cases import Case, all_cases, documents, failures, head_of, packed_case, run_program
from torch import Tensor

from mmkernels import RowSpans
from mmkernels.check.suite import SMALL_PLAIN_DRAWS
from mmkernels.ops.span_attention import reference

KERNELS = {"sm_80": ["backward_sm80", "prepare"], "sm_90a": ["query_grad_sm90", "key_grads_sm90"]}


def path_of(name: str) -> Path:
    return CSRC / "cuda" / "span_attention" / f"{name}.cu"


NAMES = [name for names in KERNELS.values() for name in names]
SOURCES = ["span_attention_backward.cpp", *(str(path_of(name)) for name in (*NAMES, "backward_sm90"))]
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass
class Backward:
    """A case, what its forward gave, and the gradients of its result and its log-sum-exp: zeros are none."""

    case: Case
    d_out: Tensor
    d_lse: Tensor  # (batch, heads, queries)

    @classmethod
    def draw(cls, case: Case, with_d_lse: bool = False) -> Backward:
        """What no query sees, and queries that see nothing, hold NaN."""
        case, visible = case.draw(), case.spans.to_dense()
        idle, unseen = ~visible.any(-1), ~visible.any(-2)
        d_out = torch.randn(case.out_shape).to(case.dtype)
        d_lse = torch.zeros(case.out_shape[:3]).mT.contiguous()
        if with_d_lse:
            d_lse.normal_().masked_fill_(idle[..., None, :], torch.nan)
        for x, rows in ((case.q, idle), (d_out, idle), (case.k, unseen), (case.v, unseen)):
            x.masked_fill_(rows[..., None, None].expand(*x.shape[:2], 1, 1), torch.nan)
        return cls(case, d_out, d_lse)

    def truth(self) -> Gradients:
        """In float64."""
        case, out, lse = self.case, *self.case.truth()
        wide = (x.double() for x in (self.d_out, case.q, case.k, case.v))
        return reference.span_attention_backward(*wide, out, lse, self.d_lse.double(), case.params)

    def plain(self) -> Gradients:
        """That of the values is promised as exact as float32."""
        (d_q, d_k, _), (_, _, d_v) = (self._plain(dtype) for dtype in (self.case.dtype, torch.float32))
        return d_q, d_k, d_v

    def _plain(self, dtype: torch.dtype) -> Gradients:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (self.case.q, self.case.k, self.case.v)]
        out, lse = replace(self.case, q=leaves[0], k=leaves[1], v=leaves[2]).plain(dtype)
        fed = self.d_out.view(out.shape).to(out.dtype), self.d_lse.view(lse.shape).to(lse.dtype)
        return torch.autograd.grad((out, lse), leaves, fed)

    def pack(self) -> bytes:
        out, lse = self.case.truth()
        shapes = [x.shape for x in (self.case.q, self.case.k, self.case.v)]
        rows = lse.float().flatten(), self.d_lse.flatten()
        return packed_case(self.case, out.to(self.case.dtype), self.d_out, *rows, results=shapes)


@pytest.fixture(params=KERNELS)
def kernel(request) -> str:
    return request.param


def served(kernel: str, cases: list[Case]) -> list[Case]:
    """Those of `cases` that the kernel serves; for Hopper's, in a place that TMA reads and writes."""
    if kernel == "sm_80":
        return cases
    cases = [x for x in cases if head_of(x) <= 128 and x.spans.num_queries > 0 and x.spans.num_keys > 0]
    aligned = [case.place != "odd" and (case.head_size | (case.value_size or 0)) % 8 == 0 for case in cases]
    return [case if fits else replace(case, place="gaps") for case, fits in zip(cases, aligned, strict=True)]


def run_cases(run, kernel: str, folder: Path, cases: list[Backward]) -> list[Gradients]:
    inner = [each.case for each in cases]
    results = run_program(run, folder, SOURCES, kernel, inner, [each.pack() for each in cases])
    found = [tuple(results.heads(case, x.shape) for x in (case.q, case.k, case.v)) for case in inner]
    assert not results.left
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_within_the_budget(run, kernel, seed, tmp_path, dtype):
    """But of one token: its d_q and d_k are differences of equal numbers, and no rounding is a budget of nothing. In
    one of the two dtypes, each case has a gradient of the log-sum-exp too."""
    every = enumerate(replace(case, dtype=dtype) for case in served(kernel, all_cases(random.Random(seed))))
    first, found = int(dtype == torch.float16), []
    drawn_from = [(case, number % 2 == first) for number, case in every if case.name != "one token"]
    cases = [Backward.draw(*each) for each in drawn_from]
    for each, args, result in zip(cases, drawn_from, run_cases(run, kernel, tmp_path, cases), strict=True):
        draws = [each, *(Backward.draw(*args) for _ in range(SMALL_PLAIN_DRAWS))]
        found += failures(each.case, "d_q d_k d_v", result, [(other.plain(), other.truth()) for other in draws])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("kernel", "head", "poisoned"),
    [("sm_80", 80, (3, 70, 108, 115, 124)), ("sm_80", 320, (70,)), ("sm_90a", 80, (3, 70, 108, 115, 124))],
)
def test_what_does_not_see_each_other_reaches_nothing(run, kernel, head, poisoned, tmp_path, poison):
    """To the bit; and a NaN reaches the gradients of all that see it, however late in the walk."""
    spans = documents(20, 90, 13, padding=3)
    clean = Backward.draw(Case("clean", spans, head_size=head), with_d_lse=True)
    sees, cases = spans.to_dense(), [clean]
    for token in poisoned:  # 124 is padding
        for name in ("q", "k", "v", "d_out", "d_lse"):
            case = replace(clean.case, name=f"{name} {token}", **{x: getattr(clean.case, x).clone() for x in "qkv"})
            dirty = Backward(case, clean.d_out.clone(), clean.d_lse.clone())
            if name == "d_lse":
                dirty.d_lse[0, :, token] = poison
            else:
                getattr(dirty if name == "d_out" else case, name)[0, token, :, 7] = poison
            cases.append(dirty)
    expected, *results = run_cases(run, kernel, tmp_path, cases)
    for each, gradients in zip(cases[1:], results, strict=True):
        name, token = each.case.name.split()
        of_query = (torch.arange(len(sees)) == int(token)) & sees.any(1)
        touched = sees[:, int(token)] if name in "kv" else of_query
        keys = sees[touched].any(0)
        for what, ours, clean_one, may in zip("qkv", gradients, expected, (touched, keys, keys), strict=True):
            assert torch.equal(ours[:, ~may], clean_one[:, ~may]), f"{each.case.name}: d_{what}"
            # d_v depends neither on v nor on d_lse, and exp(-inf) is a number.
            spoilt = (name, what) not in (("v", "v"), ("d_lse", "v"))
            spoilt = spoilt and (poison != torch.inf or name in ("d_out", "d_lse", "v"))
            assert not spoilt or not ours[:, may].isfinite().all(-1).any(), f"{each.case.name}: d_{what}"


@pytest.mark.parametrize("head", [64, 72, 128])
def test_two_blocks_share_keys(run, tmp_path, head):
    """On Hopper, where keys are few and steps many; in one case none of the steps is the second block's."""
    cases = [
        Case("many queries", RowSpans.full(530, 200), 2, 1, head, value_size=head - 8),
        Case("causal", RowSpans.packed(torch.tensor([0, 600]), torch.tensor([0, 230]), causal=True), 2, 1, head),
        Case("one step", documents(40, padding=1000, num_keys=40), 1, 1, head),
    ]
    drawn = [Backward.draw(case, with_d_lse=True) for case in cases]
    results, found = run_cases(run, "sm_90a", tmp_path, drawn), []
    for each, result in zip(drawn, results, strict=True):
        found += failures(each.case, "d_q d_k d_v", result, [(each.plain(), each.truth())])
    assert not found, "\n".join(found)


def test_keys_that_nobody_sees_and_queries_that_see_nothing_have_no_gradient(run, kernel, tmp_path):
    spans = documents(0, 70, 40, padding=90, num_keys=230)
    each = Backward.draw(Case("padding", spans, head_size=40), with_d_lse=True)
    d_q, d_k, d_v = run_cases(run, kernel, tmp_path, [each])[0]
    visible = spans.to_dense()
    assert not d_q[:, ~visible.any(1)].any()
    assert not d_k[:, ~visible.any(0)].any() and not d_v[:, ~visible.any(0)].any()


def test_a_call_that_hopper_does_not_serve_is_refused(run, tmp_path):
    """Here with heads that are too wide, with rows that lie where TMA cannot read them, and without keys."""
    spans = documents(3)
    refused = [Case("wide", spans, head_size=136), Case("odd", spans, place="odd"), Case("none", RowSpans.full(3, 0))]
    (tmp_path / "cases").write_bytes(b"".join(Backward.draw(case).pack() for case in refused))
    ran = run(SOURCES, "sm_90a", str(tmp_path / "cases"), str(tmp_path / "results"))
    assert ran.returncode == 1 and ran.stdout.count("it serves heads of up to 128 numbers") == 9, ran.stdout


@needs_nvcc
@pytest.mark.parametrize("name", KERNELS["sm_90a"])
def test_ptxas_leaves_hoppers_kernels_as_they_are(name, tmp_path):
    """It says so where it does not; of the rest, tests/compile looks at the module that was built."""
    for instructions in disassembled(compiled_by_nvcc(path_of(name), "sm_90a", tmp_path)):
        assert all(word in instructions for word in ("HGMMA", "UTMALDG", "UTMASTG"))
