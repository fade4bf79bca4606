"""How long a function takes, in milliseconds and in cycles, and each kernel in it."""

from __future__ import annotations

import functools
import re
import subprocess
import threading
import time
from collections.abc import Callable
from statistics import median

import torch

from mmkernels.bench.measure import Stopwatch
from mmkernels.bench.op import Values
from mmkernels.check.op import Call, Op, evaluate

TENSOR_FLOPS = {(9, 0): 4096}  # of half numbers in a cycle of a multiprocessor, by the generation of the GPU
PROFILED_CALLS = 3


def passes(op: Op, function: Callable, call: Call, upstream: torch.Tensor, **options: object) -> dict[str, Callable]:
    """Forward alone, and with the backward pass."""

    def forward() -> Values:
        with torch.no_grad():
            return op.named(function(**call.tensors, **call.options, **options))

    return {"fwd": forward, "fwd_bwd": functools.partial(evaluate, function, call, op, upstream, **options)}


def timed(function: Callable, device: str, seconds: float, flops: int) -> dict:
    """For about so long, after a first call. `share`: of the tensor cores' cycles, what `flops` take at their rate."""
    stopwatch, batches = Stopwatch(device), []
    with Clock(device) as clock:
        until = time.monotonic() + seconds
        while not batches or time.monotonic() < until:
            batches.append(stopwatch.alternate({"": function}, seconds)[""])
    batch = sorted(batches, key=lambda timing: timing.ms)[len(batches) // 2]
    result = {"ms": batch.ms, "ms_p10": batch.p10, "ms_p90": batch.p90, "clock_mhz": clock.mhz}
    result["tflops"] = flops / (batch.ms * 1e9)
    result["share"] = share(flops, batch.ms, clock.mhz, device)
    return result


def share(flops: float, ms: float, mhz: float | None, device: str) -> float | None:
    """Of the tensor cores' cycles; None where their rate or the clock is not known."""
    if device != "cuda" or not mhz or torch.cuda.get_device_capability() not in TENSOR_FLOPS:
        return None
    of_a_cycle = TENSOR_FLOPS[torch.cuda.get_device_capability()]
    of_a_cycle *= torch.cuda.get_device_properties(0).multi_processor_count
    return flops / (of_a_cycle * ms * mhz * 1e3)


class Clock:
    """The multiprocessors' clock while the block ran: the median of what the driver says of it, many times a second."""

    def __init__(self, device: str):
        self.mhz: float | None = None
        self._seen: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if device == "cuda" else None

    def __enter__(self) -> Clock:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join(10)
            self.mhz = median(self._seen) if self._seen else None

    def _watch(self) -> None:
        read = clock_of_the_driver
        while True:
            try:
                self._seen.append(read())
            except Exception:
                if read is clock_of_nvidia_smi:
                    return
                read = clock_of_nvidia_smi
            if self._over.wait(0.02):
                return


def clock_of_the_driver() -> float:
    return float(torch.cuda.clock_rate())  # needs nvidia-ml-py


def clock_of_nvidia_smi() -> float:
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout)


def kernels(function: Callable) -> dict[str, float]:
    """Milliseconds of each kernel in a call, as torch's profiler has them."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_CALLS):
            function()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        ms = event.self_device_time_total / 1e3 / PROFILED_CALLS
        if ms > 0:
            name = short_name(event.key)
            found[name] = found.get(name, 0.0) + ms
    return found


def short_name(kernel: str) -> str:
    """Without namespaces, return type and arguments: a kernel of ours, with the pass that its template is made for."""
    own = re.findall(r"\b(\w+_kernel)\b(?:.*?\b(\w+Pass)\b)?", kernel)
    return " ".join(filter(None, own[0])) if own else kernel[:80]
