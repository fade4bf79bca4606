"""Time and memory of a function, beside others.

The functions alternate round by round, in an order that rotates, with cold caches: whatever the machine does
meanwhile, it does to all of them. On a GPU events on the stream take the time; on a CPU the clock.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import backends
from .machine import cache_bytes, synchronize

Function = Callable[[], object]
MIN_ROUNDS, MAX_ROUNDS = 3, 60


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and how far the middle 80 % spread."""

    ms: float
    p10: float
    p90: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        values = 1e3 * torch.tensor(seconds, dtype=torch.float64)
        p10, median, p90 = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return cls(median, p10, p90)


class Stopwatch:
    """Times single calls on one device, each after the caches were swept."""

    def __init__(self, device: str):
        self._device = device
        size = max(64 << 20, 2 * cache_bytes(device))
        self._sweep = torch.zeros(size // 4, dtype=torch.float32, device=device)

    def alternate(self, functions: dict[str, Function], target_seconds: float) -> dict[str, Timing]:
        """Rounds over all functions for about `target_seconds`; they have been run before."""
        names = list(functions)
        seconds = {name: [self._time(function)] for name, function in functions.items()}
        rounds = int(target_seconds / max(sum(map(sum, seconds.values())), 1e-9))
        for number in range(1, min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)):
            start = number % len(names)
            for name in names[start:] + names[:start]:
                seconds[name].append(self._time(functions[name]))
        return {name: Timing.of(values) for name, values in seconds.items()}

    def sweep(self) -> None:
        """Fill the caches with something else. Reading leaves the CPU nothing to write back while the next one runs."""
        if self._device == "cuda":
            self._sweep.zero_()
        else:
            self._sweep.sum()

    def _time(self, function: Function) -> float:
        self.sweep()
        if self._device != "cuda":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # behind the sweep in the stream, which runs while the host prepares the call
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def with_peak_memory(function: Function, device: str) -> tuple[object, int | None]:
    """What the function returns, and the most memory it held beyond what was there before, its results included."""
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        synchronize(device)
        return result, torch.cuda.max_memory_allocated() - before
    before = _reset_peak()
    result = function()
    return result, None if before is None else max(0, _status_bytes("VmHWM") - before)


def _reset_peak() -> int | None:
    """Make this moment the process's peak; its resident bytes, or None where Linux does not allow that."""
    if backends.missing("cpu") is None:
        from .. import _core

        _core.release_kept()  # a first call's memory is what is asked for
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the next allocations come from pages counted already
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except (OSError, ValueError):
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status has no {field}")
