"""Measuring whole models: the plain one, and a copy of it that was accelerated."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..check.precision import exact_float32
from ..check.suite import name_of
from ..integrations import accelerate
from .machine import probe_peaks
from .measure import Stopwatch, with_peak_memory
from .models import Inputs, Model
from .runner import Report, finish

Run = Callable[[], Tensor]


def run_models(
    models: list[Model],
    dtypes: tuple[torch.dtype, ...],
    passes: tuple[str, ...],
    device: str,
    seconds: float,
    quick: bool,
    env: dict,
    step: Callable[[str, int, int], None],
) -> Report:
    """As `runner.run`, of models."""
    step("what this machine can do", 0, 1)
    report = Report(env | {"ceilings": []}, probe_peaks(device, list(dtypes)))
    stopwatch = Stopwatch(device)
    work = [(model, dtype) for model in models for dtype in dtypes]
    try:
        for done, (model, dtype) in enumerate(work):
            step(f"{model.name} {name_of(dtype)}", done, len(work))
            with exact_float32():
                _measure(model, dtype, passes, device, seconds, quick, stopwatch, report)
    except KeyboardInterrupt:
        report.interrupted = True
    return finish(report)


def _measure(
    model: Model,
    dtype: torch.dtype,
    passes: tuple[str, ...],
    device: str,
    seconds: float,
    quick: bool,
    stopwatch: Stopwatch,
    report: Report,
) -> None:
    gc.collect()  # what an earlier model left in cycles is not this one's memory
    torch.manual_seed(0)
    plain = model.build(quick).to(device, dtype).eval()
    inputs = {name: _cast(x.to(device), dtype) for name, x in model.inputs(quick).items()}
    ours = copy.deepcopy(plain)
    with contextlib.redirect_stdout(io.StringIO()):
        swapped = len(accelerate(ours).swapped)
    error, budget = _error_and_budget(model, plain, ours, inputs, swapped)
    if not error <= budget:
        key = {"op": "model", "case": model.name, "dtype": name_of(dtype), "device": device, "pass": "fwd"}
        reason = f"the result is off by {error:.3g} in norm, its budget is {budget:.3g}"
        report.unmeasured.append(key | {"impl": "mmkernels", "is_ours": True, "reason": reason})
        return
    for direction in passes:
        if direction == "fwd_bwd" and not model.trained:
            continue
        runs = {
            "plain": _bound(model, plain, inputs, direction),
            "mmkernels": _bound(model, ours, inputs, direction),
        }
        like_ours = replace(model, run=model.like_ours or model.run)
        flops = {"plain": _flops(runs["plain"]), "mmkernels": _flops(_bound(like_ours, plain, inputs, direction))}
        peaks = {name: with_peak_memory(run, device)[1] for name, run in runs.items()}
        place = {"case": model.name, "dtype": name_of(dtype), "pass": direction}
        ceiling = _ceiling(runs["plain"], runs["mmkernels"], device)  # of runs that are not the first
        report.env["ceilings"].append(place | {"times": ceiling})
        timings = stopwatch.alternate(runs, seconds)
        for name, timing in timings.items():
            own = {"op": "model", "case": model.name, "dtype": name_of(dtype), "device": device, "pass": direction}
            own |= {"impl": name, "is_ours": name == "mmkernels", "ms": timing.ms, "ms_p10": timing.p10}
            own |= {"ms_p90": timing.p90, "peak_bytes": peaks[name], "flops": flops[name], "bytes": 0}
            report.results.append(own | {"peak_fraction": None, "error": error, "error_budget": budget})


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _bound(model: Model, module: nn.Module, inputs: Inputs, direction: str) -> Run:
    def forward() -> Tensor:
        with torch.no_grad():
            return model.run(module, inputs)

    def forward_and_backward() -> Tensor:
        result = model.run(module, inputs)
        result.float().square().mean().backward()
        module.zero_grad()  # so that every step, the first too, allocates its gradients, and none starts with them
        return result.detach()

    return forward if direction == "fwd" else forward_and_backward


def _error_and_budget(
    model: Model, plain: nn.Module, ours: nn.Module, inputs: Inputs, swapped: int
) -> tuple[float, float]:
    """The error of the accelerated model in the norm of its result, and what it may be: twice the plain one's, and 2
    ulp for each module swapped. The truth is the plain model in float64, for half types in float32."""
    wide = torch.float64 if next(plain.parameters()).dtype == torch.float32 else torch.float32
    exact = copy.deepcopy(plain).to(wide)
    with torch.no_grad():
        truth = model.run(exact, {name: _cast(x, wide) for name, x in inputs.items()}).double()
        theirs, mine = (model.run(module, inputs) for module in (plain, ours))
    error, plain_error = ((x.double() - truth).norm().item() for x in (mine, theirs))
    return error, 2 * plain_error + 2 * swapped * torch.finfo(mine.dtype).eps * truth.norm().item()


def _flops(run: Run) -> int:
    aten = torch.ops.aten
    on_cpu = {  # torch's counter knows attention on a GPU only
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        run()
    return counter.get_total_flops()


def _ceiling(plain: Run, ours: Run, device: str) -> float:
    """How many times faster than the plain model the accelerated one would be if our ops took no time at all: what no
    kernel for them exceeds."""
    whole, rest = sum(_times(plain, device).values()), _times(ours, device)
    return whole / sum(time for name, time in rest.items() if not name.startswith("mmkernels::"))


def _times(run: Run, device: str) -> dict[str, float]:
    """Of a run, by op; a GPU's time counts for the op that launched it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the recorder tells of its start and end
    with torch.profiler.profile() as recorded:
        run()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = recorded.key_averages()
    return {event.key: getattr(event, key) for event in events if event.device_type == torch.autograd.DeviceType.CPU}


def _attention_flops(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, **_) -> int:
    """Two products of the pairs that the mask keeps: what is masked need not be computed."""
    pairs = _pairs(q.shape[0] * q.shape[1], q.shape[2], k.shape[2], is_causal, attn_mask)
    return 2 * pairs * (q.shape[3] + v.shape[3])


def _attention_backward_flops(grad, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, **_) -> int:
    """Five products: the scores again, and the gradients of scores, queries, keys and values."""
    pairs = _pairs(q.shape[0] * q.shape[1], q.shape[2], k.shape[2], is_causal, attn_mask)
    return 2 * pairs * (3 * q.shape[3] + 2 * v.shape[3])


_attention_flops._get_raw = _attention_backward_flops._get_raw = True  # FlopCounterMode: tensors, not their shapes


def _pairs(rows: int, queries: int, keys: int, is_causal: bool, mask: Tensor | None) -> int:
    if is_causal:
        return rows * sum(min(i + 1, keys) for i in range(queries))
    if mask is None:
        return rows * queries * keys
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return int(seen.sum()) * rows * queries * keys // seen.numel()
