"""Measuring the contrastive losses across the processes of a group: ours, and open_clip's in their best modes.

Each case starts its ranks anew (contrastive_rank.py): on a CPU gloo's, which share this machine's threads, and where
Linux allows it on a loopback of their own, whose counter tells what they sent; on GPUs NCCL's, one rank each.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .._installation import IMPORTED_FROM
from ..check.suite import name_of
from ..ops.contrastive.distributed import count_pieces
from .cases import CASES, OPS
from .contrastive import LossCase
from .gate import judge
from .machine import probe_peaks
from .measure import Timing
from .op import Values
from .runner import Report, Request, finish, prepare

OPS_ACROSS = ("clip_loss", "siglip_loss")
SQUARE = [x for x in CASES if isinstance(x, LossCase) and not x.texts and not x.captions]  # all that open_clip knows


def selected(request: Request) -> list[LossCase]:
    wanted = [case for case in SQUARE if not request.ops or case.op in request.ops]
    if request.cases:
        return [case for case in wanted if case.name in request.cases]
    return [case for case in wanted if (case.quick if request.quick else case.across_ranks)]


def run(request: Request, counts: Sequence[int], env: dict, step: Callable[[str, int, int], None]) -> Report:
    """As `runner.run`, of each case on each of these numbers of ranks; forward and backward."""
    step("what this machine can do", 0, 1)
    report = Report(env, probe_peaks(request.device, list(request.dtypes)))
    work = [(case, dtype) for case in selected(request) for dtype in request.dtypes]
    try:
        for done, (case, dtype) in enumerate(work):
            for ranks in counts:
                step(f"{case.op} {case.name} {name_of(dtype)} on {ranks} ranks", done, len(work))
                _measure(case, dtype, ranks, request, report)
    except KeyboardInterrupt:
        report.interrupted = True
    return finish(report)


def _measure(case: LossCase, dtype: torch.dtype, ranks: int, request: Request, report: Report) -> None:
    gc.collect()  # what an earlier case left in cycles is not free for this one's ranks
    key = {"op": case.op, "case": case.name, "dtype": name_of(dtype), "device": request.device, "pass": "fwd_bwd"}
    key |= {"ranks": ranks}
    try:
        found = _on_ranks(case, dtype, ranks, request)
    except ChildProcessError as reason:
        report.unmeasured.append(key | {"impl": "mmkernels", "is_ours": True, "reason": str(reason)})
        return
    call, _, truth = prepare(case, dtype, request.device, request.seed)
    plain, measured = OPS[case.op].plain_by_chunks(call), OPS[case.op].op
    for name, of_ranks in found.items():
        is_ours = name.startswith("mmkernels")
        if "reason" in of_ranks[0]:
            report.unmeasured.append(key | {"impl": name, "is_ours": False, "reason": of_ranks[0]["reason"]})
            continue
        values = _of_all([x["values"] for x in of_ranks], measured.result, is_ours)
        if name == next(iter(found)) and not is_ours:  # what is exact to float32 has float32 code's budget
            plain = {k: plain[k] if k in measured.wide else x for k, x in values.items()}
        worst = judge(values, plain, truth, call, case.op, is_ours)
        own = key | {"impl": name, "is_ours": is_ours}
        if is_ours and worst.failure():
            report.unmeasured.append(own | {"reason": worst.failure()})
            continue
        own |= _figures(of_ranks) | {"sent_bytes": sent_bytes(name, case, dtype, ranks)}
        own |= {"flops": case.flops("fwd_bwd") // (ranks if request.device == "cuda" else 1)}  # of the peak's device
        own |= {"bytes": case.bytes("fwd_bwd", call), "peak_fraction": None}
        report.results.append(own | {"error": worst.error, "error_budget": worst.budget})


def sent_bytes(impl: str, case: LossCase, dtype: torch.dtype, ranks: int) -> int | None:
    """What a rank hands on in a step, on paper: features, gradients and statistics; None of who is not known.

    open_clip's CLIP gathers both features, and their gradients return, in the features' type; its SigLIP moves texts
    and their gradients once, ring or gathered, and gathered sums up on every rank what one of them wants.
    """
    texts, size, wide = case.pairs * case.width // ranks, dtype.itemsize, max(dtype.itemsize, 4)
    others = ranks - 1
    if impl.startswith("open_clip"):
        return others * texts * size * (4 if case.op == "clip_loss" else 2)
    if not impl.startswith("mmkernels"):
        return None
    if case.op == "siglip_loss":
        return others * texts * (size + wide)
    gathers = 1 if count_pieces(case.op, case.pairs, case.width, case.pairs // ranks, dtype) == 1 else 2
    statistics = 3 * 4 * case.pairs * 2 * others // ranks  # an all_reduce hands on 2 (W - 1) / W of what it sums
    return others * texts * (gathers * size + wide) + statistics


def _of_all(of_ranks: list[Values], result: str, is_ours: bool) -> Values:
    """The values of the whole: gradients are parts of the loss's, open_clip's times the ranks, for DDP to average."""
    first, ranks = of_ranks[0], len(of_ranks)
    if is_ours:
        return {k: x if x.dim() == 0 else torch.cat([each[k] for each in of_ranks]) for k, x in first.items()}
    every = {k: torch.stack([each[k] for each in of_ranks]) for k in first}
    return {k: x.mean(0) if k == result or x.dim() == 1 else x.flatten(0, 1) / ranks for k, x in every.items()}


def _figures(of_ranks: list[dict]) -> dict[str, object]:
    timing, cpu = Timing.of(of_ranks[0]["seconds"]), torch.tensor(of_ranks[0]["cpu_seconds"]).median().item()
    wire, peaks = of_ranks[0]["wire_bytes"], [x["peak_bytes"] for x in of_ranks]
    return {
        "ms": timing.ms,
        "ms_p10": timing.p10,
        "ms_p90": timing.p90,
        "cpu_seconds": cpu,
        "peak_bytes": None if None in peaks else max(peaks),
        "wire_bytes": None if None in wire else min(wire) // len(of_ranks),
    }


# ---- starting the ranks


def _on_ranks(case: LossCase, dtype: torch.dtype, ranks: int, request: Request) -> dict[str, list[dict]]:
    """What each implementation's ranks found. Raises ChildProcessError with the end of what they said."""
    own_network = _own_network() if request.device == "cpu" else []
    task = {"op": case.op, "case": case.name, "dtype": name_of(dtype), "device": request.device, "ranks": ranks}
    task |= {"seed": request.seed, "seconds": 4 * request.target_seconds, "own_network": bool(own_network)}
    task |= {"threads": max(torch.get_num_threads() // ranks, 1)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "task.json").write_text(json.dumps(task))
        command = [*own_network, sys.executable, "-m", "mmkernels.bench.contrastive_rank", folder]
        child = subprocess.Popen(command, cwd=IMPORTED_FROM, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            said = child.communicate()[1]
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)  # the ranks too
            raise
        if child.returncode:
            raise ChildProcessError(said.strip().splitlines()[-1] if said.strip() else f"ended by {child.returncode}")
        of_ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    return {name: [x[name] for x in of_ranks] for name in of_ranks[0]}


def _own_network() -> list[str]:
    """A command that starts another where only the ranks are; nothing where this system allows none."""
    for command in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []
