"""The benchmarks: what they count, that they refuse wrong results, and the files they write."""

import importlib.util
import io
import json
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from mmkernels import accelerate, backends, cli
from mmkernels.bench import CASES, Request, model_runner, run
from mmkernels.bench import cases as bench_cases
from mmkernels.bench import runner as bench_runner
from mmkernels.bench.contrastive import LossCase
from mmkernels.bench.gate import judge, plain_values
from mmkernels.bench.machine import environment, probe_peaks
from mmkernels.bench.measure import Stopwatch, Timing, with_peak_memory
from mmkernels.bench.model_runner import _bound, _flops, run_models
from mmkernels.bench.models import MODELS, accelerated
from mmkernels.bench.op import Peer
from mmkernels.bench.patch_embed import PatchCase
from mmkernels.bench.report import _table, print_report, write_json
from mmkernels.bench.rotary_embed import RotaryCase
from mmkernels.bench.runner import contenders, peers, prepare
from mmkernels.bench.similarity import CodeCase, SimilarityCase
from mmkernels.bench.span_attention import AttentionCase
from mmkernels.bench.span_attention_layouts import blocks, documents, full, media
from mmkernels.check.cases import OPS
from mmkernels.check.op import Call, evaluate
from mmkernels.ops.contrastive import reference
from mmkernels.ops.span_attention import reference as attention_reference

FIELDS = (
    "op case dtype device pass impl is_ours ms ms_p10 ms_p90 peak_bytes flops bytes peak_fraction error error_budget"
)
SMALL = {"ops": ("clip_loss",), "dtypes": (torch.float32,), "passes": ("fwd_bwd",), "quick": True}


def measure(**changes):
    return run(Request(**(SMALL | changes)), environment(), lambda *_: None)


def test_json_has_the_fields_of_schema_1(tmp_path):
    report = measure(ops=("clip_loss", "patch_embed"), passes=("fwd", "fwd_bwd"))
    write_json(tmp_path / "figures.json", report)
    content = json.loads((tmp_path / "figures.json").read_text())
    assert list(content) == ["schema", "env", "peaks", "results"] and content["schema"] == 1
    assert content["env"]["unmeasured"] == [] and content["env"]["torch"] == torch.__version__
    assert content["peaks"]["float32"] > 1e8 and content["peaks"]["copy"] > 1e8
    assert report.passed
    for result in content["results"]:
        assert list(result) == FIELDS.split()
        assert 0 < result["ms_p10"] <= result["ms"] <= result["ms_p90"]
        assert result["error"] <= result["error_budget"] or not result["is_ours"]
        assert result["device"] == "cpu" and result["peak_fraction"] > 0
    groups = {(result["op"], result["case"], result["pass"]) for result in content["results"]}
    assert len(groups) == 6
    for group in groups:
        ours = [r["is_ours"] for r in content["results"] if (r["op"], r["case"], r["pass"]) == group]
        assert ours.count(True) == 1 and ours.count(False) >= 1


def wrong_gradient(monkeypatch, chosen):
    def clip_loss_with_grads(*args):
        loss, d_image, *others = reference.clip_loss_with_grads(*args)
        return loss, 1.01 * d_image, *others

    fake = SimpleNamespace(**(vars(reference) | {"clip_loss_with_grads": clip_loss_with_grads}))
    monkeypatch.setattr(backends, "_load", lambda op, name: fake)
    monkeypatch.setattr(backends, "missing", lambda name: None)
    monkeypatch.setenv("MMKERNELS_BACKEND", chosen)


def test_a_wrong_result_gets_no_figure(monkeypatch):
    wrong_gradient(monkeypatch, "reference")
    report = measure()
    assert not report.passed and not any(result["is_ours"] for result in report.results)
    (missed,) = report.unmeasured
    assert missed["is_ours"] and "d_image_features is off by" in missed["reason"]


def test_a_peer_that_fails_is_told_not_hidden(monkeypatch):
    def broken(image_features, text_features, logit_scale):
        raise RuntimeError("not on this machine")

    measured = bench_cases.OPS["clip_loss"]
    with_broken = replace(measured, peers=lambda call: [*measured.peers(call), Peer("broken", broken)])
    monkeypatch.setitem(bench_cases.OPS, "clip_loss", with_broken)
    report = measure()
    assert report.passed and {result["is_ours"] for result in report.results} == {True, False}
    (missed,) = report.unmeasured
    assert missed["impl"] == "broken" and missed["reason"] == "RuntimeError: not on this machine"
    console = recording_console()
    print_report(console, report)
    assert "no figure: clip_loss 512x256 float32 fwd_bwd broken: RuntimeError: not on" in console.export_text()


def test_an_interrupt_keeps_what_was_measured(monkeypatch):
    def interrupt(case, dtype, request, stopwatch, report, real=bench_runner._measure):
        if report.results:
            raise KeyboardInterrupt
        real(case, dtype, request, stopwatch, report)

    monkeypatch.setattr(bench_runner, "_measure", interrupt)
    report = measure(ops=("clip_loss", "siglip_loss"))
    assert {result["op"] for result in report.results} == {"clip_loss"} and not report.passed
    assert all(result["peak_fraction"] for result in report.results)


def test_a_peer_that_takes_too_long_or_too_much_is_told(monkeypatch):
    monkeypatch.setattr(bench_runner, "CALL_LIMIT", 0.0)
    assert "s a call, more than 0 s" in measure().unmeasured[0]["reason"]
    monkeypatch.setattr(bench_runner, "free_bytes", lambda device: 0)
    report = measure()
    assert report.unmeasured[0]["reason"] == "needs about 0 GB, 0 GB are free"
    assert report.passed and [result["is_ours"] for result in report.results] == [True]


def recording_console(width=200):
    return Console(record=True, width=width, file=io.StringIO())


PEERS = ("compiled normalise + cut + linear", "compiled FlexAttention", "SDPA, groups as queries", "compiled eager")


@pytest.mark.parametrize("width", [80, 150])
@pytest.mark.parametrize("peer", PEERS)
def test_the_table_keeps_figures_and_names_at_the_width_of_a_terminal(peer, width):
    for case in CASES:
        own = {"op": case.op, "case": case.name, "dtype": "bfloat16", "pass": "fwd_bwd", "peak_fraction": 0.4}
        own |= {"error": 1.0, "error_budget": 4.0}
        ours = own | {"impl": "mmkernels:cpu", "is_ours": True, "ms": 1.0, "peak_bytes": 3562 << 20}
        other = own | {"is_ours": False, "peak_bytes": 12345 << 20}
        others = [other | {"impl": "eager", "ms": 129.47}, other | {"impl": peer, "ms": 60.55}]
        console = recording_console(width)
        console.print(_table(case.op, [[ours, *others]], ()))
        text = console.export_text()
        figures = "129.47", "60.55", "40%", "3562", "12345", "0.25"
        for whole in (case.name, "bfloat16, fwd + bwd", *figures, *peer.split()):
            assert whole in text
        assert "\N{HORIZONTAL ELLIPSIS}" not in text and max(map(len, text.splitlines())) <= width


def test_the_table_quotes_ratios_and_no_bare_times():
    report = measure()
    for result in report.results:
        result["ms"] = 10.0 if result["is_ours"] else 35.0
        result["ms_p10"] = result["ms_p90"] = result["ms"]
    console = recording_console()
    print_report(console, report)
    text = console.export_text()
    assert "3.50" in text and " ms" not in text and "busy" not in text


@pytest.mark.parametrize(
    "case, flops",
    [
        (LossCase("clip_loss", 4096, 512), {"fwd": 2 * 4096**2 * 512, "fwd_bwd": 6 * 4096**2 * 512}),
        (LossCase("siglip_loss", 4096, 512), {"fwd": 2 * 4096**2 * 512, "fwd_bwd": 6 * 4096**2 * 512}),
        (PatchCase("x", (32, 3, 224, 224), (768, 3, 16, 16)), {"fwd": 2 * 6272 * 768**2, "fwd_bwd": 4 * 6272 * 768**2}),
        (PatchCase("x", (16, 3, 336, 336), (1024, 3, 14, 14)), {"fwd": 2 * 9216 * 588 * 1024}),
        (PatchCase("x", (4096, 1176), (1280, 3, 2, 14, 14)), {"fwd": 2 * 4096 * 1176 * 1280}),
        (AttentionCase("x", full(30, 50), (8, 2), 64), {"fwd": 4 * 8 * 1500 * 64, "fwd_bwd": 14 * 8 * 1500 * 64}),
        (AttentionCase("x", full(1, 50), (8, 2), 64, batch=3), {"fwd": 4 * 3 * 8 * 50 * 64}),
        (AttentionCase("x", documents((3, 5)), (2, 2), 16), {"fwd": 4 * 2 * (6 + 15) * 16}),
        (AttentionCase("x", documents((3, 5), window=2), (2, 2), 16), {"fwd": 4 * 2 * (5 + 9) * 16}),
        (
            AttentionCase("x", documents((300, 5), images=True), (1, 1), 16),
            {"fwd": 4 * (300 * 301 // 2 + 256 * 255 // 2 + 15) * 16},
        ),
        (AttentionCase("x", media(10, (0, 4), (3, 7), "immediate"), (1, 1), 16), {"fwd": 4 * (4 * 3 + 6 * 7) * 16}),
    ],
    ids=lambda value: value.op if hasattr(value, "op") else "",
)
def test_operations_are_those_of_the_mathematics(case, flops):
    assert {direction: case.flops(direction) for direction in flops} == flops


def test_bytes_are_what_must_be_read_and_written(seed):
    case = PatchCase("x", (2, 3, 32, 32), (8, 3, 16, 16), uint8=True)
    call, *_ = prepare(case, torch.bfloat16, "cpu", seed)
    assert case.bytes("fwd", call) == 2 * 3 * 32 * 32 + 2 * 8 * 768 + 2 * 8 * 8
    case = AttentionCase("x", full(1, 50), (8, 2), 64, batch=3)
    call, *_ = prepare(case, torch.bfloat16, "cpu", seed)
    assert case.bytes("fwd", call) == 2 * 3 * 64 * (2 * 8 + 2 * 2 * 50)


SHRUNK = [
    LossCase("clip_loss", 40, 24),
    LossCase("siglip_loss", 40, 24),
    PatchCase("images", (2, 3, 33, 47), (20, 3, 16, 16)),
    PatchCase("uint8", (2, 3, 32, 48), (20, 3, 16, 16), uint8=True),
    PatchCase("channels_last", (2, 3, 32, 48), (20, 3, 16, 16), channels_last=True),
    PatchCase("rows", (30, 1176), (20, 3, 2, 14, 14), bias=False),
    AttentionCase("packed", documents((20, 1, 33)), (2, 2)),
    AttentionCase("images", documents((300, 5), images=True), (2, 1), 16),
    AttentionCase("equal lengths", documents((30, 30)), (2, 1), 80),
    AttentionCase("window", documents((70,), window=9), (2, 2)),
    AttentionCase("windows of documents", documents((30, 41), window=9), (2, 2)),
    AttentionCase("full", full(30, 50), (2, 2)),
    AttentionCase("blocks", blocks((16,) * 3, (16,) * 3), (2, 2), 80),
    AttentionCase("immediate", media(40, (0, 10, 20, 30), (7,) * 4, "immediate"), (2, 2)),
    AttentionCase("previous", media(40, (0, 15), (7, 9), "previous"), (2, 2)),
    AttentionCase("group", media(40, (0, 20, 21), (12, 7, 7), "group"), (2, 2)),
    AttentionCase("decode", full(1, 50), (4, 2), batch=3),
    RotaryCase("queries and keys", 30, 4, 16),
    CodeCase(300, 40, 8),
    SimilarityCase(270, 1, 5, 8),
    SimilarityCase(9, 6, 5, 8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SHRUNK, ids=lambda case: f"{case.op}-{case.name}")
def test_every_peer_computes_the_same_thing(case, dtype, seed):
    call, upstream, truth = prepare(case, dtype, "cpu", seed)
    _, eager, *others = contenders(case, call, upstream, "fwd_bwd")
    plain = plain_values(eager.run(), eager.function, call, case.op)
    for peer in (eager, *others):
        values = peer.run()
        assert set(values) == set(truth.values)
        worst = judge(values, plain, truth, call, case.op, is_ours=False)
        assert worst.complaint is None
        assert worst.error <= 0.05 * max(1.0, worst.size), (peer.name, worst)


def peers_of(case, device="cpu", dtype=torch.float32):
    call = case.make(bench_runner.Draw(0), dtype, device)
    return {peer.name: peer for peer in peers(case, call)}


def test_attention_is_measured_against_all_that_can_express_it():
    dense, loop = "SDPA, dense mask", "SDPA per sequence"
    expected = {
        "packed": [dense, loop, "SDPA, padded"],
        "images": [dense, loop, "SDPA, padded"],
        "equal lengths": [dense, loop, "SDPA, one batch"],
        "window": [dense],
        "windows of documents": [dense, loop, "SDPA, padded"],
        "full": ["SDPA"],
        "blocks": [dense, loop, "SDPA, one batch"],
        "immediate": [dense, loop, "SDPA, one batch"],
        "previous": [dense, loop],
        "group": [dense, loop],
        "decode": ["SDPA", "SDPA, groups as queries"],
    }
    found = {case.name: list(peers_of(case)) for case in SHRUNK if case.op == "span_attention"}
    assert found == expected


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [case for case in SHRUNK if case.op == "span_attention"], ids=lambda case: case.name)
def test_flex_attention_is_told_the_same_mask(case, seed, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = replace(case, compiled=("cpu",))
    call, upstream, truth = prepare(case, torch.float32, "cpu", seed)
    assert "compiled FlexAttention" not in [x.name for x in contenders(case, call, upstream, "fwd_bwd")]
    (flex,) = [x for x in contenders(case, call, upstream, "fwd") if x.name == "compiled FlexAttention"]
    worst = judge(flex.run(), None, truth, call, case.op, is_ours=False)
    assert worst.complaint is None and worst.error <= 1e-5, worst


@pytest.mark.parametrize("case", [case for case in SHRUNK if case.op == "span_attention"], ids=lambda case: case.name)
def test_the_truth_of_attention_does_not_depend_on_its_blocks(case, seed, monkeypatch):
    monkeypatch.setattr("mmkernels.bench.span_attention.ROWS", 7)
    call, upstream, truth = prepare(case, torch.float32, "cpu", seed)
    spans = {"spans": call.options["layout"].spans()}
    op = OPS["span_attention"]
    whole = evaluate(op.call, Call(call.in_dtype(torch.float64).tensors, spans, call.differentiable), op, upstream,
                     backend="reference")  # fmt: skip
    for name, value in whole.items():
        torch.testing.assert_close(truth.values[name], value, rtol=1e-12, atol=1e-12)


def test_what_decoding_has_no_use_for_is_not_measured():
    report = measure(ops=("span_attention",), cases=("decode-1",), passes=("fwd", "fwd_bwd"))
    assert {result["pass"] for result in report.results} == {"fwd"}


def test_cases_of_a_loss_and_of_a_device_have_names_of_their_own():
    for op in OPS:
        names = [case.name for case in CASES if case.op == op]
        assert len(set(names)) == len(names)
    assert {case.name for case in Request(ops=("clip_loss",)).selected()} == {
        "1024x512",
        "2048x6144x512",
        "4096x512",
        "4096x512, captions",
        "4096x768",
        "8192x512",
    }
    assert [case.name for case in Request(("clip_loss",), ("32768x512",)).selected()] == ["32768x512"]
    assert all(case.quick for case in Request(quick=True).selected())
    assert "32768x768" in {case.name for case in Request(device="cuda").selected()}


def test_only_some_cases_pay_for_torch_compile(seed):
    for case in SHRUNK:
        call = case.make(bench_runner.Draw(seed), torch.float32, "cpu")
        assert not any(peer.compiled for peer in peers(case, call))
    case = LossCase("clip_loss", 40, 24, compiled=("cpu",))
    call = case.make(bench_runner.Draw(seed), torch.float32, "cpu")
    assert [peer.compiled for peer in peers(case, call)] == [False, True]


def test_timing_is_median_and_spread():
    timing = Timing.of([0.001 * x for x in range(1, 12)])
    assert [timing.p10, timing.ms, timing.p90] == pytest.approx([2, 6, 10])


def test_functions_alternate_in_a_rotating_order():
    calls = []
    timings = Stopwatch("cpu").alternate({name: lambda name=name: calls.append(name) for name in "abc"}, 0.0)
    assert set(timings) == set("abc") and not math.isnan(timings["a"].ms)
    assert "".join(calls) == "abc" + "bca" + "cab"


def test_peak_memory_counts_what_the_call_held():
    def wasteful():
        scratch = torch.ones(32 << 20)  # 128 MB
        return scratch[:4].clone()

    result, peak = with_peak_memory(wasteful, "cpu")
    assert result.tolist() == [1, 1, 1, 1]
    assert 120 << 20 <= peak <= 160 << 20
    _, small = with_peak_memory(lambda: torch.ones(1 << 20), "cpu")
    assert small <= 32 << 20  # the peak before it is forgotten


def test_peaks_are_probed():
    peaks = probe_peaks("cpu", [torch.float32, torch.bfloat16])
    assert set(peaks) == {"float32", "bfloat16", "copy", "source"}
    assert peaks["float32"] > 1e8


def measure_models(*models):
    return run_models(list(models), (torch.float32,), ("fwd",), "cpu", 0.0, True, environment(), lambda *_: None)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_each_model_is_measured_plain_and_accelerated(model):
    report = measure_models(model)
    (ceiling,) = report.env["ceilings"]
    assert ceiling["case"] == model.name and ceiling["times"] > 0  # of models so small, overheads decide on it
    assert report.passed and [r["is_ours"] for r in report.results] == [False, True]
    for result in report.results:
        assert list(result) == FIELDS.split() and result["op"] == "model" and result["case"] == model.name
        assert result["error"] <= result["error_budget"] and result["flops"] > 0


def test_the_ceiling_is_that_of_a_model_whose_ops_of_ours_take_no_time(monkeypatch):
    times = {
        "plain": {"aten::mm": 60.0, "aten::conv2d": 40.0},
        "ours": {"aten::mm": 50.0, "mmkernels::patch_embed": 9.0},
    }
    monkeypatch.setattr(model_runner, "_times", lambda run, device: times[run])
    assert model_runner._ceiling("plain", "ours", "cpu") == 2.0


def test_every_model_can_be_named_and_is_in_the_help(capsys):
    assert [model.name for model in MODELS] == list(cli.MODELS)
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    printed = " ".join(capsys.readouterr().out.replace("\n", "").split())
    with pytest.raises(SystemExit):
        cli.main(["bench", "--model", "gpt"])
    refused = capsys.readouterr().err
    assert all(name in printed.replace(" ", "") and name in refused for name in cli.MODELS)


def refused_model(capsys) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--model", MODELS[0].name])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_models_need_the_library_they_come_from(monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else there(name))
    assert re.search(r"--model: needs transformers .*pip install \"mmkernels\[examples\]\"", refused_model(capsys))


def test_a_torchvision_of_another_torch_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    wanted = r"torchvision here does not fit torch .*nms.*pip uninstall torchvision"
    assert re.search(wanted, refused_model(capsys))


def test_steps_start_without_gradients():
    """Else the gradients' memory would count for the one that steps first alone."""
    model = MODELS[0]
    module, inputs = model.build(True), model.inputs(True)
    _bound(model, module, inputs, "fwd_bwd")()
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    "options, pairs",
    [
        ({}, 36),
        ({"is_causal": True}, 21),
        ({"attn_mask": torch.eye(6).bool()}, 6),
        ({"attn_mask": torch.zeros(6, 6)}, 36),
    ],
)
def test_flops_of_attention_on_a_cpu(options, pairs):
    """Two products forward and five backward, of the pairs that count."""
    q = torch.randn(2, 3, 6, 8, requires_grad=True)

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, **options)

    assert _flops(attend) == 2 * 2 * 6 * 8 * pairs
    assert _flops(lambda: attend().sum().backward()) == 7 * 2 * 6 * 8 * pairs


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_what_is_accelerated_is_told_from_what_is_plain(model):
    """Else a step in which the two differ would be measured plain twice."""
    module = model.build(True)
    assert not accelerated(module)
    accelerate(module, verbose=False)
    assert accelerated(module)


def test_padding_is_no_work_of_ours():
    model = next(model for model in MODELS if model.name == "llava-packed-or-padded")
    plain, ours = measure_models(model).results
    assert ours["is_ours"] and ours["flops"] < plain["flops"]


@pytest.mark.parametrize("name", ["llava-packed-or-padded", "llava-packed-or-masked"])
def test_a_pack_that_lost_a_boundary_gets_no_figure(name):
    model = next(model for model in MODELS if model.name == name)

    def run(module, pack):
        """What is accelerated takes two documents for one."""
        ends = pack["cu_seq_lens_q"]
        if accelerated(module):
            pack = pack | dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.cat([ends[:1], ends[2:]]))
        return model.run(module, pack)

    report = measure_models(replace(model, run=run))
    assert not report.passed and not report.results
    assert "is off by" in report.unmeasured[0]["reason"]


def test_a_model_that_is_wrong_once_accelerated_gets_no_figure(monkeypatch):
    model = next(model for model in MODELS if model.name == "mllama-cross-attention")
    right = attention_reference.span_attention
    monkeypatch.setattr(attention_reference, "span_attention", lambda *args: [1.01 * x for x in right(*args)])
    monkeypatch.setenv("MMKERNELS_BACKEND", "reference")
    report = measure_models(model)
    assert not report.passed and not report.results
    (missed,) = report.unmeasured
    assert missed["is_ours"] and "is off by" in missed["reason"]
