"""Around span attention's result: the log-sum-exp and its gradient, sinks, which are made of these, and spans that are
kept from an evaluation to the training after it.

That the gradients are right on the fixed cases is tests/test_check.py's, on any layout test_span_attention.py's.
"""

import pytest
import torch
import torch._dynamo.testing
from dense_attention import dense_attention, evaluate, inputs, threads
from span_layouts import int32

from mmkernels import RowSpans, explain, span_attention

NAN = float("nan")


# ---- the log-sum-exp -------------------------------------------------------------------------------------------------


def test_parts_of_the_keys_merge_by_their_log_sum_exp(backend):
    """As ring attention does, under autograd: the gradients are those of attention to all of them."""
    spans = RowSpans.packed(int32([0, 20, 60]), causal=True)
    tensors, d_out = inputs(spans, (4, 2)), torch.randn(60, 4, 16)
    outs, lses = [], []
    for start in range(0, 60, 20):
        part = RowSpans((spans.lo - start).clamp(0, 20), (spans.hi - start).clamp(0, 20), 20)  # of some, no key
        keys = slice(start, start + 20)
        out, lse = span_attention(
            tensors[0], tensors[1][keys], tensors[2][keys], part, return_lse=True, backend=backend
        )
        outs.append(out)
        lses.append(lse)
    shares = torch.stack(lses).softmax(0).mT[..., None]
    merged = (shares * torch.stack(outs)).sum(0)
    want = span_attention(*tensors, spans, backend=backend)
    torch.testing.assert_close(merged, want)
    torch.testing.assert_close(
        torch.autograd.grad(merged, tensors, d_out), torch.autograd.grad(want, tensors, d_out), rtol=1e-4, atol=1e-5
    )


def test_a_loss_may_hold_the_log_sum_exp_alone(backend):
    """Its gradient comes as autograd has it: expanded, transposed, NaN where a query sees nothing."""
    spans = RowSpans.packed(int32([0, 7, 20]), num_queries=26, causal=True)
    q, k, v = inputs(spans, (4, 2))
    mask = spans.to_dense()
    for loss in (torch.Tensor.sum, lambda x: (x.mT.square() * torch.arange(4)).sum()):
        _, lse = span_attention(q, k, v, spans, return_lse=True, backend=backend)
        _, dense = dense_attention(q, k, v, mask, return_lse=True)
        ours = torch.autograd.grad(loss(lse), (q, k, v))
        want = torch.autograd.grad(loss(dense[:, :20]), (q, k), allow_unused=True)
        torch.testing.assert_close(ours[:2], want)
        assert not ours[2].any() and not ours[0][20:].any() and not ours[1][20:].any()


def test_a_log_sum_exp_that_nobody_differentiates_costs_nothing(monkeypatch):
    """The kernels get no gradient of it; nor do a compiled function's, if nobody asked for it."""
    from mmkernels.ops.span_attention import reference

    given, original = [], reference.span_attention_backward

    def note(*args):
        given.append(args[6])
        return original(*args)

    monkeypatch.setattr(reference, "span_attention_backward", note)
    spans = RowSpans.full(5, 7)
    tensors = inputs(spans)
    span_attention(*tensors, spans, return_lse=True, backend="reference")[0].sum().backward()
    span_attention(*tensors, spans, backend="reference").sum().backward()
    compiled = torch.compile(lambda *x: span_attention(*x, backend="reference"), backend="aot_eager", fullgraph=True)
    compiled(*tensors, spans).sum().backward()
    assert given == [None] * 3
    span_attention(*tensors, spans, return_lse=True, backend="reference")[1].sum().backward()
    assert given[3].shape == (1, 2, 5)


def test_second_derivatives_of_the_log_sum_exp_are_refused(backend):
    spans = RowSpans.full(3, 3)
    q, k, v = inputs(spans)
    lse = span_attention(q, k, v, spans, return_lse=True, backend=backend)[1]
    (grad,) = torch.autograd.grad(lse.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_sinks_are_one_more_key_without_a_value(backend):
    """Of any dtype and strides; those of -inf are none; queries that see nothing have zeros and the sink."""
    spans = RowSpans(int32([[0, 1, 4, 0], [3, 6, 4, 7]]), int32([[2, 3, 4, 7], [5, 7, 4, 7]]), 7)
    for dtype, batch in ((torch.float32, None), (torch.bfloat16, 2)):
        q, k, v = (x.detach().float() for x in inputs(spans, (4, 2), (16, 8), dtype, batch))
        sinks = torch.randn(4, 3)[:, 1]
        options = {"scale": 0.5, "softcap": 3.0, "return_lse": True}
        want, want_lse = dense_attention(q, k, v, spans.to_dense(), sinks=sinks, **options)
        half = (x.to(dtype) for x in (q, k, v))
        out, lse = span_attention(*half, spans, sinks=sinks, backend=backend, **options)
        assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous()
        torch.testing.assert_close(out.float(), want, **({} if batch is None else {"rtol": 1.6e-2, "atol": 1e-2}))
        torch.testing.assert_close(lse, want_lse)
        assert not out[..., 2, :, :].any() and torch.equal(lse[..., 2], sinks.expand(lse.shape[:-1]))
    plain = span_attention(q, k, v, spans, backend=backend, **options)
    none = torch.full((4,), -torch.inf, requires_grad=True)
    found = span_attention(q, k, v, spans, sinks=none, backend=backend, **options)
    assert all(map(torch.equal, found, plain))
    (found[0].sum() + found[1].masked_fill(plain[1] == -torch.inf, 0.0).sum()).backward()
    assert not none.grad.any()


def test_only_the_gradients_asked_for_of_sinks(backend):
    spans = RowSpans.packed(int32([0, 5, 17]), num_queries=20, causal=True)
    q, k, v = inputs(spans, (4, 2))
    sinks, d_out = torch.randn(4, requires_grad=True), torch.randn(20, 4, 16)
    d_out[17:] = NAN  # of queries that see nothing
    every = torch.autograd.grad(span_attention(q, k, v, spans, sinks=sinks, backend=backend), (q, k, v, sinks), d_out)
    assert all(x.isfinite().all() for x in every)
    out = span_attention(q.detach(), k.detach(), v.detach(), spans, sinks=sinks, backend=backend)
    assert torch.equal(torch.autograd.grad(out, sinks, d_out)[0], every[3])
    out = span_attention(q, k, v, spans, sinks=sinks.detach(), backend=backend)
    assert all(map(torch.equal, torch.autograd.grad(out, (q, k, v), d_out), every))


@pytest.mark.parametrize("heads", [1, 2])
def test_the_same_gradient_of_sinks_on_any_number_of_threads(heads):
    spans = RowSpans.packed(int32([0, 40000]), causal=True, window=2)
    tensors = [x.detach() for x in inputs(spans, (heads, heads), (1, 1))]
    tensors.append(torch.randn(heads))
    d_out = torch.randn(40000, heads, 1)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(evaluate(span_attention, tensors, d_out, spans, backend="cpu")[-1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_sinks_compile_whole_and_once_and_obey_autocast(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(q, k, v, sinks, spans):
        return span_attention(q, k, v, spans, sinks=sinks, return_lse=True, backend=backend)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (9, 20, 33):
        spans = RowSpans.packed(int32([0, 4, tokens]), causal=True)
        tensors = [*inputs(spans, (6, 3), (8, 16)), torch.randn(6, requires_grad=True)]
        ours, want = compiled(*tensors, spans), step(*tensors, spans)
        torch.testing.assert_close(ours, want)
        fed = [torch.randn_like(x) for x in want]
        torch.testing.assert_close(torch.autograd.grad(ours, tensors, fed), torch.autograd.grad(want, tensors, fed))
    assert counter.frame_count == 1
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = step(*tensors, spans)
    half = step(*(x.bfloat16() for x in tensors[:3]), tensors[3], spans)
    assert out.dtype == torch.bfloat16 and torch.equal(out, half[0]) and torch.equal(lse, half[1])
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.sum() + lse.sum(), tensors))


def test_explain_takes_sinks_and_runs_nothing():
    spans = RowSpans.full(3, 5)
    chosen = [each.chosen for each in explain("span_attention", *inputs(spans), spans, sinks=torch.zeros(2))]
    assert sum(chosen) == 1
    with pytest.raises(ValueError, match="sinks has shape"):
        explain("span_attention", *inputs(spans), spans, sinks=torch.zeros(3))


# ---- spans that were evaluated with ----------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["used in inference mode", "made in inference mode"])
def test_spans_of_an_evaluation_serve_training(backend, made):
    """What is made in inference mode and kept on the spans, autograd would not save."""
    with torch.inference_mode(made == "made in inference mode"):
        spans = RowSpans.packed(int32([0, 4, 12]), int32([0, 6, 14]), causal=True)
    tensors = inputs(spans)
    with torch.inference_mode():
        want = span_attention(*tensors, spans, backend=backend)
        spans.hulls(), spans.documents()
    out = span_attention(*tensors, spans, backend=backend)
    assert torch.equal(out, want)
    fresh = span_attention(*tensors, RowSpans(spans.lo.clone(), spans.hi.clone(), 14), backend=backend)
    found, expected = (torch.autograd.grad(x.square().sum(), tensors) for x in (out, fresh))
    assert all(map(torch.equal, found, expected))
