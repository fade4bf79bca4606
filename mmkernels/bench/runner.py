"""Measuring: ours and its peers, case by case, gated by their error."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .. import backends
from ..check.budget import Quantity
from ..check.draw import Draw
from ..check.op import Call
from ..check.precision import exact_float32
from ..check.suite import name_of
from .cases import CASES, GROWTH, OPS
from .gate import judge, plain_values
from .machine import Peaks, free_bytes, probe_peaks, synchronize
from .measure import Stopwatch, Timing, with_peak_memory
from .op import DTYPES, PASSES, Case, Peer, Series, Truth, Values

CALL_LIMIT = 60.0  # seconds; a peer that takes longer for one call is reported so, not measured

COMPILE_SECONDS = 8.0  # a pass


@dataclass(frozen=True)
class Request:
    ops: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = DTYPES
    passes: tuple[str, ...] = PASSES
    device: str = "cpu"
    quick: bool = False
    seed: int = 0
    growth: bool = False  # series of sizes, of which `cases` name some, instead of single cases

    def selected(self) -> list[Case]:
        if not self.growth:
            return [case for case in CASES if self._wants(case)]
        return [case for series in self.series() for case in series.cases.values()]

    def series(self) -> list[Series]:
        if not self.growth:
            return []
        return [x for x in GROWTH if self._wants_op(x.op) and (not self.cases or x.name in self.cases)]

    def place(self, case: Case) -> dict[str, str | int]:
        """Where in a series it stands, if it does."""
        sizes = ((series.name, *each) for series in self.series() for each in series.cases.items())
        return next(({"series": name, "size": size} for name, size, one in sizes if one is case), {})

    def _wants(self, case: Case) -> bool:
        if not self._wants_op(case.op):
            return False
        if self.cases:
            return case.name in self.cases
        return case.quick if self.quick else self.device in case.devices

    def _wants_op(self, op: str) -> bool:
        return not self.ops or op in self.ops

    @property
    def target_seconds(self) -> float:
        return 0.3 if self.quick else 1.5


@dataclass(frozen=True)
class Contender:
    """An implementation with its arguments bound: `run` returns its result and, with gradients, those too."""

    name: str
    is_ours: bool
    run: Callable[[], Values]
    function: Callable
    compiled: bool = False


@dataclass
class Report:
    env: dict[str, object]
    peaks: Peaks
    results: list[dict] = field(default_factory=list)
    unmeasured: list[dict] = field(default_factory=list)  # what has no figure, and why

    interrupted: bool = False

    @property
    def passed(self) -> bool:
        return not self.interrupted and not any(record["is_ours"] for record in self.unmeasured)


def run(request: Request, env: dict, step: Callable[[str, int, int], None]) -> Report:
    """Measure what the request asks for; `step(description, done, total)` hears of the progress.

    An interrupt ends it early; what was measured until then is in the report.
    """
    step("what this machine can do", 0, 1)
    report = Report(env, probe_peaks(request.device, list(request.dtypes)))
    stopwatch = Stopwatch(request.device)
    work = [(case, dtype) for case in request.selected() for dtype in request.dtypes]
    try:
        for done, (case, dtype) in enumerate(work):
            step(f"{case.op} {case.name} {name_of(dtype)}", done, len(work))
            with exact_float32():
                _measure(case, dtype, request, stopwatch, report)
            _raise_peaks(report, probe_peaks(request.device, list(request.dtypes)))
    except KeyboardInterrupt:
        report.interrupted = True
    return finish(report)


def expected_seconds(request: Request) -> float:
    """About, as two cores of a server took: of each case in a dtype some seconds a pass, most of them to empty caches,
    the operations of all contenders, of which the truth in float64 is the slowest, and what is compiled."""
    seconds = 0.0
    for case in request.selected():
        for direction in set(case.passes) & set(request.passes):
            seconds += 2.5 if request.quick else 9.0
            if request.device == "cpu":
                seconds += case.flops(direction) / (5e9 * torch.get_num_threads())
            seconds += COMPILE_SECONDS * (request.device in case.compiled)
    return seconds * len(request.dtypes)


def finish(report: Report) -> Report:
    """With what the figures are of the peaks, now that these are known for good."""
    for result in report.results:
        floor = _floor_seconds(result["flops"], result["bytes"], result["dtype"], report.peaks)
        result["peak_fraction"] = floor * 1e3 / result["ms"]
    return report


def _raise_peaks(report: Report, again: Peaks) -> None:
    """The peak is the best of the probes between the cases: what disturbed one of them disturbs no fraction."""
    report.peaks |= {name: max(rate, report.peaks[name]) for name, rate in again.items()}


def prepare(case: Case, dtype: torch.dtype, device: str, seed: int) -> tuple[Call, torch.Tensor, Truth]:
    """The arguments of a case, the gradient its result is fed with, and the truth."""
    draw = Draw(seed, case.op, case.name)
    call = case.make(draw, dtype, device)
    upstream = case.upstream(draw, call)
    return call, upstream, OPS[case.op].truth(call, upstream)


def contenders(case: Case, call: Call, upstream: torch.Tensor, direction: str) -> Iterator[Contender]:
    """Ours, served by the fastest backend here, then the peers with eager PyTorch first."""
    op = OPS[case.op].op
    function, result = op.call, op.result
    chosen = next(x.backend for x in backends.explain(function, **call.tensors, **call.options) if x.chosen)
    yield Contender(f"mmkernels:{chosen}", True, _bind(function, call, upstream, direction, result), function)
    for peer in peers(case, call):
        if direction in peer.passes:
            bound = _bind(peer.function, call, upstream, direction, result)
            yield Contender(peer.name, False, bound, peer.function, peer.compiled)


def peers(case: Case, call: Call) -> list[Peer]:
    """What is measured beside ours on these arguments, eager first."""
    found, device = OPS[case.op].peers(call), next(iter(call.tensors.values())).device.type
    return [*found, OPS[case.op].compile(found[-1], device)] if device in case.compiled else found


def _bind(function, call: Call, upstream: torch.Tensor, direction: str, result_name: str) -> Callable[[], Values]:
    if direction == "fwd":

        def forward() -> Values:
            with torch.no_grad():
                return {result_name: function(**call.tensors, **call.options)}

        return forward
    leaves = {name: call.tensors[name].detach().requires_grad_() for name in call.differentiable}
    arguments = call.tensors | leaves | call.options

    def forward_and_backward() -> Values:
        result = function(**arguments)
        gradients = torch.autograd.grad(result, list(leaves.values()), upstream.to(result.dtype))
        named = {f"d_{name}": value for name, value in zip(leaves, gradients, strict=True)}
        return {result_name: result.detach()} | named

    return forward_and_backward


def _measure(case: Case, dtype: torch.dtype, request: Request, stopwatch: Stopwatch, report: Report) -> None:
    gc.collect()  # what an earlier case left in cycles is not this one's memory
    call, upstream, truth = prepare(case, dtype, request.device, request.seed)
    for direction in filter(case.passes.__contains__, request.passes):
        key = {"op": case.op, "case": case.name, "dtype": name_of(dtype), "device": request.device, "pass": direction}
        key |= request.place(case)
        if case.compiled:
            torch.compiler.reset()
        runs, records, plain = {}, {}, None
        ours, *others = contenders(case, call, upstream, direction)
        for contender in (*others, ours):  # eager first: its error makes the budget
            own = key | {"impl": contender.name, "is_ours": contender.is_ours}
            try:
                values, peak_bytes, seconds = _first_run(contender, case, call, direction, request.device)
                if contender is others[0]:
                    plain = plain_values(values, contender.function, call, case.op)
                if seconds > CALL_LIMIT and not contender.is_ours:
                    raise TimeoutError(f"takes {seconds:.0f} s a call, more than {CALL_LIMIT:.0f} s")
                if plain is None:  # eager PyTorch does not fit
                    plain = OPS[case.op].plain_by_chunks(call)
                worst = judge(values, plain, truth, call, case.op, contender.is_ours)
                if contender.is_ours and worst.failure():
                    raise ArithmeticError(worst.failure())
            except Exception as reason:
                report.unmeasured.append(own | {"reason": f"{_kind(reason)}{reason}"})
                continue
            runs[contender.name] = contender.run
            records[contender.name] = own, peak_bytes, worst
        timings = stopwatch.alternate(runs, request.target_seconds) if runs else {}
        costs = {"flops": case.flops(direction), "bytes": case.bytes(direction, call)}
        for name, (own, peak_bytes, worst) in records.items():
            report.results.append(_record(own, timings[name], peak_bytes, costs, worst))


def _first_run(
    contender: Contender, case: Case, call: Call, direction: str, device: str
) -> tuple[Values, int | None, float]:
    """The values, the peak memory and the seconds of one call."""
    if not contender.is_ours:
        needed, free = case.eager_bytes(direction, call), free_bytes(device)
        if needed > 0.9 * free:
            raise MemoryError(f"needs about {needed >> 30} GB, {free >> 30} GB are free")
    if contender.compiled:
        contender.run()
    start = time.perf_counter()
    values, peak_bytes = with_peak_memory(contender.run, device)
    synchronize(device)
    return values, peak_bytes, time.perf_counter() - start


def _kind(reason: Exception) -> str:
    """The class of an unforeseen error; the others say what they are."""
    return "" if isinstance(reason, (ArithmeticError, MemoryError, TimeoutError)) else f"{type(reason).__name__}: "


def _floor_seconds(flops: int, moved: int, dtype: str, peaks: Peaks) -> float:
    """What no implementation undercuts: the operations at the peak rate or the bytes at the copy's."""
    return max(flops / peaks[dtype], moved / peaks["copy"])


def _record(own: dict, timing: Timing, peak_bytes: int | None, costs: dict, worst: Quantity) -> dict:
    """A result of the schema; peak_fraction follows when the peaks are known for good."""
    measured = {"ms": timing.ms, "ms_p10": timing.p10, "ms_p90": timing.p90, "peak_bytes": peak_bytes}
    return own | measured | costs | {"peak_fraction": None, "error": worst.error, "error_budget": worst.budget}
