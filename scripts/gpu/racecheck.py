"""Races between the threads of our CUDA kernels, as compute-sanitizer's racecheck finds them in shared memory: one call
of each op, forward and backward, long enough for every ring of stages to come round."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial

import torch

from mmkernels.check.cases import OPS
from mmkernels.check.draw import Draw
from mmkernels.check.op import evaluate
from mmkernels.check.suite import select

from .pool import Row

SECONDS, ROW_SECONDS, WORKERS = 75, 70, 4
CASES = {  # of `mmkernels check`, for each op that has CUDA kernels
    "span_attention": "causal, 1100 keys",
    "clip_loss": "300x512, scale 100",
    "siglip_loss": "300x512, scale 100",
    "patch_embed": "E 272, K 768",
}


def rows(device: str) -> list[Row]:
    return [Row(op, partial(watch, op, device)) for op in CASES]


def watch(op: str, device: str) -> dict:
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], toolkit]))
    call = [sys.executable, "-m", "gpu.racecheck", op, device]
    watched = [tool, "--tool", "racecheck", "--error-exitcode", "9", "--print-limit", "20"] if tool else []
    ran = subprocess.run([*watched, *call], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = ran.stdout.splitlines()
    last = " | ".join(lines[-4:])
    if tool is None:
        return {"failure": last} if ran.returncode else {"skipped": "no compute-sanitizer here: it ran unwatched"}
    summary = next((line.strip("= ") for line in lines if "RACECHECK SUMMARY" in line), None)
    if summary is None:
        return {"skipped": f"compute-sanitizer did not come to an end: {last}"}
    hazards = [line.strip("= ") for line in lines if "hazard" in line.lower() and "SUMMARY" not in line][:10]
    result = {"summary": summary, "hazards": hazards}
    return result | ({"failure": f"{summary}; {last}"} if ran.returncode else {})


def call_once(op: str, device: str) -> None:
    """In a process of its own, which does little else."""
    ((case, dtype),) = select(op, CASES[op], "bfloat16")
    backend = "cuda" if device == "cuda" else "reference"
    draw = Draw(0, op, case.name)
    call = case.make(draw, dtype, device)
    with torch.no_grad():
        result = OPS[op].named(OPS[op].call(**call.tensors, **call.options, backend=backend))[OPS[op].result]
    upstream = case.upstream(draw, result).to(device, dtype)
    values = evaluate(OPS[op].call, call, OPS[op], upstream, backend=backend)
    print(f"{op}: {', '.join(values)}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def told(results: dict[str, dict]) -> list[str]:
    return [f"  {op}: {result['summary']}" for op, result in results.items() if "summary" in result]


if __name__ == "__main__":
    call_once(*sys.argv[1:])
