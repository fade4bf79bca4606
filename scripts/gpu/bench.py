"""What a user would run instead, bfloat16: the cases of `mmkernels bench` that were made for a GPU, then those for any
device, as far as the time reaches. Ops that have more than one rival come first."""

from __future__ import annotations

from functools import partial

import torch
from rich.console import Console

from mmkernels.bench.cases import CASES, OPS
from mmkernels.bench.machine import environment
from mmkernels.bench.report import print_report
from mmkernels.bench.runner import Report, Request, run

from .check import in_turn
from .pool import Row

SECONDS, ROW_SECONDS, WORKERS = 540, 90, 1  # the last step: all that is left


def rows(device: str) -> list[Row]:
    if device == "cpu":
        groups = [[case for case in CASES if case.quick]]
    else:
        measured = [case for case in CASES if device in case.devices]
        groups = [[case for case in measured if (case.devices == (device,)) == alone] for alone in (True, False)]
    found = []
    for group in groups:
        ops = sorted(dict.fromkeys(case.op for case in group), key=lambda op: not OPS[op].several_peers)
        found += in_turn([row for case in group if case.op == op for row in _rows(case, device)] for op in ops)
    return found


def _rows(case, device: str) -> list[Row]:
    return [
        Row(f"{case.op}|{case.name}|{direction}", partial(measure, case.op, case.name, direction, device))
        for direction in case.passes
    ]


def measure(op: str, name: str, direction: str, device: str) -> dict:
    """What `mmkernels bench` would write of it."""
    request = Request((op,), (name,), (torch.bfloat16,), (direction,), device, quick=device == "cpu")
    report = run(request, environment(), lambda *_: None)
    result = {"env": report.env, "peaks": report.peaks, "results": report.results, "unmeasured": report.unmeasured}
    ours = [record["reason"] for record in report.unmeasured if record["is_ours"]]
    return result | ({"failure": "; ".join(ours)} if ours else {})


def told(results: dict[str, dict]) -> list[str]:
    found = [result for result in results.values() if "results" in result]
    if not found:
        return []
    peaks = dict(found[0]["peaks"])
    for result in found:
        peaks |= {name: max(rate, peaks[name]) for name, rate in result["peaks"].items() if name != "source"}
    measured, unmeasured = ([record for result in found for record in result[key]] for key in ("results", "unmeasured"))
    return tables(found[0]["env"], peaks, measured, unmeasured)


def tables(env: dict, peaks: dict, results: list[dict], unmeasured: list[dict]) -> list[str]:
    """As `mmkernels bench` prints them."""
    console = Console(width=120, no_color=True)
    with console.capture() as printed:
        print_report(console, Report(env, peaks, results, unmeasured))
    return printed.get().splitlines()
