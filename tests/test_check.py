"""Every kernel equals its reference; and the suite that says so would notice if one did not."""

import importlib
import io
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from draws import SEED
from rich.console import Console

from mmkernels import backends
from mmkernels.check import CASES, run_case, select
from mmkernels.check.budget import Quantity, distance, largest, ulp
from mmkernels.check.cases import OPS
from mmkernels.check.contrastive_truth import contrastive_truth
from mmkernels.check.draw import DRAWS, Draw
from mmkernels.check.op import evaluate
from mmkernels.check.poison import MEMORY, guarded, poisoned
from mmkernels.check.report import print_report
from mmkernels.check.suite import CLOSE_DRAWS, Outcome, _Drawn, name_of
from mmkernels.ops.contrastive import reference as contrastive_reference
from mmkernels.ops.contrastive.pairing import Pairing, Shares
from mmkernels.ops.patch_embed import reference as patch_reference
from mmkernels.ops.rotary_embed import reference as rotary_reference
from mmkernels.ops.similarity import reference as similarity_reference
from mmkernels.ops.span_attention import reference as span_reference
from mmkernels.ops.span_attention.sinks import with_sinks

GPU = torch.cuda.is_available()
# Without a GPU, Triton's kernels run in its interpreter, which only the quick cases are small enough for; dtypes there
# by turns, since the kernels are the same.
PLACES = [("reference", "cpu"), ("cpu", "cpu")]
PLACES += [("reference", "cuda"), ("triton", "cuda")] if GPU else [("triton", "cpu")]
PLACES += [] if backends.missing("flash-attn") else [("flash-attn", "cuda")]
EVERYTHING = [
    pytest.param(case, dtype, backend, device, id=f"{backend}-{device}-{case.op}-{case.name}-{name_of(dtype)}")
    for backend, device in PLACES
    for interpreted in [backend == "triton" and device == "cpu"]
    for case, dtype in select("span_attention" if backend == "flash-attn" else None, quick=interpreted)
    if not interpreted or dtype == case.dtypes[(SEED + CASES.index(case)) % len(case.dtypes)]
]


@pytest.mark.parametrize(("case", "dtype", "backend", "device"), EVERYTHING)
def test_kernel_equals_reference(case, dtype, backend, device, seed):
    outcome = run_case(case, dtype, backend, device, seed)
    if backend == "flash-attn" and outcome.unsupported:
        pytest.skip(outcome.unsupported)
    assert outcome.passed, "\n".join([outcome.reproduce(), *outcome.failures, outcome.unsupported or ""])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_reference_and_plain_code_mean_the_same(case, seed):
    """In float64 the two agree to half the digits and more: the budget is measured against the same function."""
    op = OPS[case.op]
    draw = Draw(seed, case.name)
    call = case.make(draw, case.dtypes[0], "cpu").in_dtype(torch.float64)
    upstream = case.upstream(draw, op.named(op.plain(**call.tensors, **call.options))[op.result].detach())
    truth, plain = (
        evaluate(f, call, op, upstream, **kw) for f, kw in ((op.call, {"backend": "reference"}), (op.plain, {}))
    )
    for name, value in truth.items():
        assert value.shape == plain[name].shape
        size = max(1.0, largest(value[value.isfinite()]))
        assert distance(plain[name], value) <= size * torch.finfo(torch.float64).eps ** 0.5, name


@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss"])
@pytest.mark.parametrize("same", [None, "positives", "ignored"])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunked_truth_is_the_reference(op, same, rows, monkeypatch, seed):
    texts = 29 if same is None else 34
    monkeypatch.setattr("mmkernels.check.contrastive_truth.CHUNK_ELEMENTS", rows * texts)
    image, text = (torch.nn.functional.normalize(torch.randn(n, 11, dtype=torch.float64)) for n in (29, texts))
    scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    ids = (None, None) if same is None else (torch.randint(20, (29,)), torch.randint(20, (texts,)))
    pairing = Pairing.of(29, texts, *ids, same)
    smoothing, direction = (0.0 if same == "ignored" else 0.1), ("text_to_image" if rows == 1 else "both")
    if op == "clip_loss":
        options = dict(label_smoothing=smoothing, pairing=pairing, direction=direction)
        truth, _ = contrastive_truth(op, image, text, 20.0, **options)
        call = image, text, scale, pairing, Shares.of(pairing, direction), smoothing
        expected = (*contrastive_reference.clip_loss_with_grads(*call), torch.zeros(()))
    else:
        truth, _ = contrastive_truth(op, image, text, 20.0, -3.0, pairing=pairing)
        expected = contrastive_reference.siglip_loss_with_grads(image, text, scale, bias, pairing, 29)
    for value, other in zip((truth.loss, *truth.gradients().values()), expected, strict=True):
        torch.testing.assert_close(value, other.double(), rtol=1e-9, atol=1e-9)


def test_response_bounds_what_a_rounded_logit_does(seed):
    """Moving the logits by the 2 ulp that `response` speaks of moves no gradient further than it says."""
    image, text = (torch.nn.functional.normalize(torch.randn(30, 8, dtype=torch.float64)) for _ in range(2))
    _, response = contrastive_truth("clip_loss", image, text, 100.0)
    logits = 100.0 * image @ text.T
    step = 2 * ulp(torch.float32, logits.abs().max().item())
    moved = logits + step * (2 * torch.randint(0, 2, logits.shape) - 1)
    d_logits = [((s.softmax(1) + s.softmax(0)) / 2 - torch.eye(30)) / 30 for s in (logits, moved)]
    reached = (100.0 * ((d_logits[1] - d_logits[0]) @ text)).abs().max()
    assert 0.01 * response.image_features.max() < reached <= 2 * response.image_features.max()


@pytest.mark.parametrize("scale", [15.0, 30.0])
def test_response_knows_how_little_moves_what_is_told_apart(scale, seed):
    """A loss near zero, and its gradients, move by their own size times the ulp, not by that of a probability of 1."""
    image = torch.nn.functional.normalize(torch.randn(30, 64, dtype=torch.float64))
    truth, response = contrastive_truth("clip_loss", image, image, scale)
    assert response.loss < 4 * scale * torch.finfo(torch.float32).eps * truth.loss
    assert (
        response.image_features.max() < 40 * scale * torch.finfo(torch.float32).eps * truth.image_features.abs().max()
    )


@pytest.mark.parametrize("fed", [4.0, 0.25])
def test_response_of_a_gradient_grows_with_what_feeds_the_result(fed, monkeypatch):
    case = case_named("siglip_loss", "one image")
    monkeypatch.setattr(type(case), "upstream", lambda self, draw, result: torch.full_like(result, fed))
    drawn = _Drawn.of(case, torch.float32, Outcome("siglip_loss", case.name, "reference", "float32", "cpu", 0), 0)
    plain = OPS["siglip_loss"].response(drawn.call)
    assert drawn.responses.pop("loss") == plain.pop("loss")
    assert drawn.responses == {name: fed * value for name, value in plain.items()}


# ---- the suite notices ----


def plant(monkeypatch, **wrong):
    """Make the backend "triton" the reference with some functions replaced."""
    references = [importlib.import_module(f"mmkernels.ops.{name}.reference") for name in backends.HOT_PATHS]
    good = {name: value for module in references for name, value in vars(module).items() if not name.startswith("_")}
    good |= {"unsupported": lambda *tensors: None, "patch_embed": rounded_once}
    load, missing, fake = backends._load, backends.missing, SimpleNamespace(**(good | wrong))
    monkeypatch.setattr(backends, "_load", lambda op, name: fake if name == "triton" else load(op, name))
    monkeypatch.setattr(backends, "missing", lambda name: None if name == "triton" else missing(name))


def rounded_once(patches, additions):
    """Tokens as kernels make them; the reference rounds half types before it adds to them."""
    weight = patches.weight
    wide = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.promote_types(weight.dtype, torch.float32))
    added = (None if x is None else x.to(wide.dtype) for x in additions)
    tokens = patch_reference.patch_embed(patches._replace(weight=wide.copy_(weight)), type(additions)(*added))
    return tokens.to(weight.dtype)


def case_named(op, name):
    return next(case for case in CASES if (case.op, case.name) == (op, name))


def failures(op, name, dtype=torch.float32, seed=0):
    outcome = run_case(case_named(op, name), dtype, "triton", seed=seed)
    assert not outcome.passed
    return "\n".join(outcome.failures)


def with_grads(op, change):
    def wrong(*call):
        results = list(getattr(contrastive_reference, f"{op}_with_grads")(*call))
        change(results)
        return tuple(results)

    return {f"{op}_with_grads": wrong}


def clip_with_grads(change):
    return with_grads("clip_loss", change)


def patch_forward(change):
    def wrong(patches, additions):
        tokens = patch_reference.patch_embed(patches, additions)
        change(tokens, patches.images)
        return tokens

    return {"patch_embed": wrong}


def span_forward(change):
    def wrong(*args):
        results = span_reference.span_attention(*args)
        change(*results, *args)
        return results

    return {"span_attention": wrong}


def span_backward(change):
    def wrong(*args):
        grads = span_reference.span_attention_backward(*args)
        change(grads)
        return grads

    return {"span_attention_backward": wrong}


def test_an_honest_copy_passes(monkeypatch, seed):
    plant(monkeypatch)
    for case, dtype in select(quick=True):
        outcome = run_case(case, dtype, "triton", seed=seed)
        assert outcome.passed, outcome.failures


@pytest.mark.parametrize("index, name", [(1, "d_image_features"), (2, "d_text_features"), (3, "d_logit_scale")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finds_a_scaled_gradient(monkeypatch, index, name, dtype):
    plant(monkeypatch, **clip_with_grads(lambda results: results[index].mul_(1.05)))
    assert f"{name} is off by" in failures("clip_loss", "37x65", dtype)


def test_finds_a_half_precision_loss(monkeypatch):
    """The loss is promised in float32 of half features too; bfloat16 logits are not enough."""
    plant(monkeypatch, **clip_with_grads(lambda results: results[0].copy_(results[0].bfloat16())))
    assert "loss is off by" in failures("clip_loss", "37x65", torch.bfloat16)


@pytest.mark.parametrize(("op", "case"), [("clip_loss", "37x65"), ("clip_loss", "captions"), ("siglip_loss", "37x65")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finds_what_half_code_would_excuse(monkeypatch, op, case, dtype):
    """The loss and its gradients by numbers of float32 are as exact as float32, whatever the features are."""
    names = ("loss", "d_image_features", "d_text_features", "d_logit_scale", "d_logit_bias")
    factors = {"loss": 1.00001, "d_logit_scale": 1.0001} | ({"d_logit_bias": 1.0001} if op == "siglip_loss" else {})
    for name, factor in factors.items():
        index = names.index(name)
        plant(monkeypatch, **with_grads(op, lambda results, i=index, by=factor: results[i].mul_(by)))
        assert f"{name} is off by" in failures(op, case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finds_a_gradient_that_half_code_has_lost(monkeypatch, dtype):
    """Of a pair that is told apart half logits leave nothing, which excused anything."""
    plant(monkeypatch, **with_grads("clip_loss", lambda results: results[1].mul_(1.05)))
    assert "d_image_features is off by" in failures("clip_loss", "one image", dtype)


def test_finds_a_wrong_last_row(monkeypatch):
    plant(monkeypatch, **clip_with_grads(lambda results: results[1][-1].zero_()))
    assert "d_image_features is off by" in failures("clip_loss", "37x65")
    plant(monkeypatch, **patch_forward(lambda tokens, *_: tokens[-1, -1].add_(0.01)))
    assert "tokens is off by" in failures("patch_embed", "P16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finds_sums_in_half(monkeypatch, dtype):
    """Sums are promised in float32: here 32 products at a time are rounded."""

    def in_half(patches, additions):
        pixels, rows = patch_reference._pixels(patches), patch_reference._rows(patches.weight, patches.geometry)
        tokens = sum(x @ w.T for x, w in zip(pixels.split(32, -1), rows.split(32, -1), strict=True))
        return tokens.reshape(patches.geometry.result_shape(len(rows), 0))

    plant(monkeypatch, patch_embed=in_half)
    assert "tokens is off by" in failures("patch_embed", "rows, chw, Conv3d", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finds_small_numbers_lost(monkeypatch, dtype):
    """An element is rounded by itself: the ulp of a large one excuses no small one."""

    def lost(x):
        return x.masked_fill(x.abs() < torch.finfo(dtype).eps * x.abs().max(), 0)

    plant(
        monkeypatch,
        rotary_embed=lambda *args: lost(rotary_reference.rotary_embed(*args)),
        patch_embed=lambda *args: lost(rounded_once(*args)),
    )
    assert "out is off by" in failures("rotary_embed", "T 37, H 3, D 80", dtype)
    assert "tokens is off by" in failures("patch_embed", "E 130, 300 patches", dtype)


def test_finds_an_element_not_written(monkeypatch):
    def forget_one(tokens, _):
        tokens[0, 1, 3] = torch.empty_like(tokens)[0, 1, 3]

    plant(monkeypatch, **patch_forward(forget_one))
    assert "1 of 480 elements NaN or infinite, the first at (0, 1, 3)" in failures("patch_embed", "P16")


@pytest.mark.parametrize(
    ("overrun", "growth", "draws", "passes"),
    [(1.4, 1.0, DRAWS + CLOSE_DRAWS, False), (1.4, 1.5, DRAWS + CLOSE_DRAWS, True), (3.0, 9.0, DRAWS, False)],
)
def test_a_close_verdict_is_settled_by_more_draws(monkeypatch, overrun, growth, draws, passes, seed):
    """growth: of the budget, as plain code's largest error over many draws makes it."""
    calls, budget = [], 1e-3  # beside which what is truly rounded is nothing

    def shift(tokens, *_):
        calls.append(1)
        tokens += overrun * budget

    plant(monkeypatch, **patch_forward(shift))
    monkeypatch.setattr(Quantity, "allowance", property(lambda _: budget * (growth if len(calls) > DRAWS + 1 else 1)))
    outcome = run_case(case_named("patch_embed", "P16"), torch.float32, "triton", seed=seed)
    assert outcome.passed == passes and len(calls) == draws + 1  # the first draw is run twice


@pytest.mark.parametrize("name", ["P16", "crop", "rows, strided"])
def test_finds_a_read_past_the_edge(monkeypatch, name):
    def read_past(tokens, images):
        last = sum((size - 1) * stride for size, stride in zip(images.shape, images.stride(), strict=True))
        tokens += 0 * images.as_strided((1,), (1,), images.storage_offset() + last + 1).to(tokens)

    plant(monkeypatch, **patch_forward(read_past))
    assert "NaN" in failures("patch_embed", name)


def test_finds_other_bits_in_a_second_run(monkeypatch):
    calls = []

    def flicker(results):
        calls.append(1)
        results[1][0, 0] = torch.nextafter(results[1][0, 0], torch.tensor(math.inf * (-1) ** len(calls)))

    plant(monkeypatch, **clip_with_grads(flicker))
    assert "d_image_features: a second run" in failures("clip_loss", "37x65")


def test_finds_a_written_input(monkeypatch):
    plant(monkeypatch, **patch_forward(lambda tokens, images: images.mul_(1.001)))
    assert "images was written to" in failures("patch_embed", "P16")


def test_finds_a_swallowed_nan(monkeypatch):
    plant(monkeypatch, clip_loss=lambda *args: contrastive_reference.clip_loss(*args).nan_to_num(3.0))
    assert "a NaN in row 18 of text_features gives a loss of 3.0" in failures("clip_loss", "37x65")


def test_finds_a_turn_too_far(monkeypatch):
    def too_far(x, cos, sin, *others):
        return rotary_reference.rotary_embed(x, cos, 1.05 * sin, *others)

    plant(monkeypatch, rotary_embed=too_far)
    found = failures("rotary_embed", "T 37, H 3, D 80")
    assert "out is off by" in found and "d_x is off by" in found


def maxima(change):
    """The largest products, after `change(maxima, indices)` in place."""

    def row_maxima(*args):
        found = similarity_reference.row_maxima(*args)
        change(*found)
        return found

    return {"row_maxima": row_maxima}


def test_finds_a_code_that_is_not_the_nearest(monkeypatch):
    plant(monkeypatch, **maxima(lambda _, indices: indices[3].add_(1).remainder_(100)))
    found = failures("nearest_code", "N 37, K 100, D 8")
    assert "distances is off by" in found and "d_codes is off by" in found


def test_finds_the_last_of_equals_taken(monkeypatch):
    """Its product is right, and the gradient goes to the wrong token."""

    def last_first(rows, columns, bias, starts):
        flipped = len(columns) - starts.flip(0)
        found, indices = similarity_reference.row_maxima(rows, columns.flip(0), bias, flipped)
        indices = torch.where(indices < 0, indices, len(columns) - 1 - indices)
        return found.flip(1), indices.flip(1)

    plant(monkeypatch, row_maxima=last_first)
    found = failures("max_similarity", "equal products")
    assert "d_images is off by" in found and "similarity is off by" not in found


def test_finds_a_hidden_nan_among_products(monkeypatch):
    plant(monkeypatch, **maxima(lambda found, _: found.nan_to_num_(0.0)))
    assert "the result hides NaN in texts" in failures("max_similarity", "a token each")


def test_finds_a_gradient_scattered_to_a_neighbour(monkeypatch):
    def beside(weights, rows, indices, count):
        return similarity_reference.scatter(weights, rows, indices, count).roll(1, 0)

    plant(monkeypatch, scatter=beside)
    assert "d_codes is off by" in failures("nearest_code", "N 37, K 100, D 8")


def test_an_op_exact_to_float32_need_not_be_a_loss(monkeypatch):
    monkeypatch.setitem(OPS, "rotary_embed", replace(OPS["rotary_embed"], wide=("out",)))
    case = case_named("rotary_embed", "T 37, H 3, D 80")
    assert run_case(case, torch.float32, "reference").passed
    assert run_case(case, torch.bfloat16, "reference").failures == [
        "out has dtype torch.bfloat16 instead of torch.float32"
    ]


@pytest.mark.parametrize("index, name", [(0, "d_q"), (1, "d_k"), (2, "d_v")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finds_a_scaled_gradient_of_attention(monkeypatch, index, name, dtype):
    plant(monkeypatch, **span_backward(lambda grads: grads[index].mul_(1.05)))
    assert f"{name} is off by" in failures("span_attention", "small causal", dtype)


@pytest.mark.parametrize("name", ["small, lse", "small, lse, two runs, softcap"])
@pytest.mark.parametrize("wrong", [lambda x: None, lambda x: -x, lambda x: x.roll(1, 1)], ids=["lost", "sign", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finds_a_wrong_gradient_of_the_log_sum_exp(monkeypatch, name, wrong, dtype):
    def changed(d_out, q, k, v, out, lse, d_lse, params):
        return span_reference.span_attention_backward(d_out, q, k, v, out, lse, wrong(d_lse.nan_to_num(0.0)), params)

    plant(monkeypatch, span_attention_backward=changed)
    found = failures("span_attention", name, dtype)
    assert "d_q is off by" in found and "d_k is off by" in found and "d_v" not in found


def test_finds_a_gradient_of_the_log_sum_exp_of_nothing(monkeypatch):
    """It is NaN, and reaches what the queries' padding beside it gives: their dQ."""

    def leak(d_out, q, k, v, out, lse, d_lse, params):
        d_q, d_k, d_v = span_reference.span_attention_backward(d_out, q, k, v, out, lse, d_lse, params)
        return d_q + 0 * d_lse.mT[..., None].to(d_q), d_k, d_v

    plant(monkeypatch, span_attention_backward=leak)
    assert "d_q has" in failures("span_attention", "small, lse")


def test_finds_a_wrong_gradient_of_sinks(monkeypatch, seed):
    """Every backend and the truth share the code of sinks: plain PyTorch is who contradicts."""

    def wrong(out, lse, sinks, want_lse):
        return with_sinks(out, lse, sinks * 1.01 - sinks.detach() * 0.01, want_lse)

    monkeypatch.setattr("mmkernels.ops.span_attention.with_sinks", wrong)
    for name in ("sinks, small, lse", "sinks alone, heads 6/2"):
        with pytest.raises(AssertionError, match="d_sinks"):
            test_reference_and_plain_code_mean_the_same(case_named("span_attention", name), seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finds_a_key_too_many(monkeypatch, dtype):
    def one_more(q, k, v, params):
        return span_reference.span_attention(q, k, v, params._replace(hi=params.hi + (params.hi == 31)))

    plant(monkeypatch, span_attention=one_more)
    found = failures("span_attention", "small causal", dtype)
    assert "out is off by" in found and "lse is off by" in found


def test_finds_padding_that_leaks(monkeypatch):
    """The NaN of a key that nobody sees, times a weight of zero."""

    def leak(out, lse, q, k, v, *_):
        out += 0 * v.sum()

    plant(monkeypatch, **span_forward(leak))
    assert "out has" in failures("span_attention", "small, padding")
    plant(monkeypatch, **span_forward(lambda out, *_: None))
    assert run_case(case_named("span_attention", "small, padding"), torch.float32, "triton").passed


def test_finds_the_wrong_log_sum_exp_of_nothing(monkeypatch):
    plant(monkeypatch, **span_forward(lambda out, lse, *_: lse.masked_fill_(lse == -math.inf, -1e30)))
    assert "lse is off by inf" in failures("span_attention", "small, padding")


@pytest.mark.parametrize("wrong", [lambda lse: lse.bfloat16(), lambda lse: lse + 1e-5], ids=["half", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finds_a_log_sum_exp_short_of_float32(monkeypatch, wrong, dtype):
    plant(monkeypatch, **span_forward(lambda out, lse, *_: lse.copy_(wrong(lse))))
    assert "lse is off by" in failures("span_attention", "small causal", dtype)


def test_finds_a_softmax_of_half_scores(monkeypatch):
    """As eager code computes capped ones; the softmax is promised in float32."""
    scores = span_reference._scores

    def rounded(q, k, mask, params):
        exact, derivative = scores(q, k, mask, params)
        return exact.to(q.dtype).to(exact.dtype), derivative

    def in_half(*args):
        with monkeypatch.context() as patched:
            patched.setattr(span_reference, "_scores", rounded)
            return span_reference.span_attention(*args)

    plant(monkeypatch, span_attention=in_half)
    assert "out is off by" in failures("span_attention", "softcap 20", torch.bfloat16)


def test_finds_written_spans(monkeypatch):
    plant(monkeypatch, **span_forward(lambda out, lse, q, k, v, params: params.lo.clamp_(0, 3)))
    assert "lo was written to" in failures("span_attention", "small, beyond the keys")


def test_finds_an_exception_and_a_wrong_dtype(monkeypatch):
    def explode(*_):
        raise MemoryError("no room")

    plant(monkeypatch, patch_embed=explode)
    assert "raised MemoryError: no room" in failures("patch_embed", "P16")
    plant(monkeypatch, **clip_with_grads(lambda results: results.insert(0, results.pop(0).double())))
    assert "loss has dtype torch.float64 instead of torch.float32" in failures("clip_loss", "3x7, scale 1")


def test_what_a_backend_does_not_serve_is_no_failure_and_no_pass(monkeypatch):
    plant(monkeypatch, unsupported=lambda *tensors: "not on a Friday")
    outcome = run_case(case_named("patch_embed", "P16"), torch.float32, "triton")
    assert not outcome.passed and not outcome.failures and "not on a Friday" in outcome.unsupported


# ---- its parts ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1.999, 0.7, 100.0, 3e-5, 0.0])
def test_ulp_is_the_distance_to_the_next_number(dtype, size):
    value = torch.tensor(size, dtype=dtype)
    assert ulp(dtype, value.item()) == (torch.nextafter(value, torch.tensor(math.inf, dtype=dtype)) - value).item()


def test_scalars_of_plain_code_are_not_trusted_to_the_bit():
    truth = torch.tensor(1.0, dtype=torch.float64)
    quantity = Quantity("loss", torch.float32, torch.bfloat16)
    quantity.add(truth.float(), truth.bfloat16(), truth)
    assert quantity.plain_error == 2**-8


def test_plain_overflow_is_not_a_licence():
    quantity = Quantity("loss", torch.float32, torch.float32)
    with pytest.raises(ArithmeticError, match="overflows"):
        quantity.add(torch.ones(2), torch.tensor([1.0, math.inf]), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("memory", [kind for kind in MEMORY if kind != "far"])
def test_guarded_keeps_the_values_and_hides_nan_around_them(memory):
    values = torch.randn(2, 3, 4, 6)
    view = guarded(values, memory)
    assert torch.equal(view, values[:1].expand(2, -1, -1, -1) if memory == "expanded" else values)
    storage = torch.empty(0).set_(view.untyped_storage(), 0, (view.untyped_storage().nbytes() // 4,))
    distinct = 72 if memory == "expanded" else 144
    assert storage.numel() - int(storage.isnan().sum()) == distinct
    assert storage[: view.storage_offset()].isnan().all() and storage[-32:].isnan().all()
    assert (view.data_ptr() % 64 == 0) == (memory != "odd")


def test_poison_is_in_new_memory_and_gone_afterwards():
    with poisoned():
        assert torch.empty(1000).isnan().all() and torch.empty_like(torch.ones(3, 3)).isnan().all()
        assert torch.ones(2).new_empty(7).isnan().all() and torch.empty_strided((2, 3), (3, 1)).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_same_seed_draws_the_same_call():
    first, again, other = (case_named("clip_loss", "37x65").make(Draw(s), torch.float32, "cpu") for s in (1, 1, 2))
    assert torch.equal(first.tensors["image_features"], again.tensors["image_features"])
    assert not torch.equal(first.tensors["image_features"], other.tensors["image_features"])


def test_the_table_fits_a_terminal():
    """At 80 columns: only where the worst error lies is folded, at its spaces."""
    quantity = {"name": "d_text_features", "error": 123.45, "budget": 1.0}
    records = [
        {"op": op, "case": case, "backend": backend, "device": device, "dtype": "bfloat16", "failures": []}
        | {"quantities": [quantity], "unsupported": unsupported}
        for op in OPS
        for backend, device in (("triton", "cpu"), ("flash-attn", "cuda"))
        for case, unsupported in [("interleaved, a batch of its own tables", None)] * 104 + [("other", "no")] * 12
    ]
    console = Console(record=True, width=80, file=io.StringIO())
    print_report(console, records, [], 2**31)
    text = console.export_text()
    rows = [line for line in text.splitlines() if "bfloat16" in line]
    for row in rows:
        assert all(whole in row for whole in ("104 of 104", " 12 ", "123.45"))
    assert len(rows) == 2 * len(OPS) and "d_text_features" in text and "interleaved," in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text and all(f"\n{op} " in text for op in OPS)
