"""The machine a figure was measured on, and the most it can do: what every figure is quoted against."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path

import torch

from .. import backends
from .._version import __version__

Peaks = dict[str, float | str]


def environment() -> dict[str, object]:
    """Versions and hardware; what is not there is None."""
    cuda = torch.cuda.is_available()
    return {
        "mmkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flash-attn": _version("flash-attn"),
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "cpu": cpu_model(),
        "isa": instruction_set(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def instruction_set() -> str | None:
    """The level the compiled core works at, None without it."""
    if backends.missing("cpu"):
        return None
    from .. import _core

    return _core.isa()


def cache_bytes(device: str) -> int:
    """The last-level cache of the device, as far as it tells."""
    if device == "cuda":
        return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.rstrip("KM")) << (20 if text.endswith("M") else 10)
    except (OSError, ValueError):
        return 32 << 20


def free_bytes(device: str) -> int:
    if device == "cuda":  # what torch keeps for reuse is free too
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def probe_peaks(device: str, dtypes: list[torch.dtype]) -> Peaks:
    """FLOP/s a dtype and copied bytes/s (read and written), measured now: the best of several tries.

    On a CPU with the compiled core that is a loop of multiply-adds in registers, else torch's matrix product, which
    no program is sure to beat but some may.
    """
    if device == "cpu" and backends.missing("cpu") is None:
        from .. import _core

        threads = torch.get_num_threads()
        rates = {dtype: max(_core.fma_peak(_fma_kind(dtype), threads) for _ in range(7)) for dtype in dtypes}
        source = "multiply-adds in registers"
    else:
        rates = {dtype: _matmul_rate(device, dtype) for dtype in dtypes}
        source = "torch matrix product"
    named: Peaks = {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()}
    return named | {"copy": _copy_rate(device), "source": source}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _fma_kind(dtype: torch.dtype) -> str:
    return "bfloat16" if dtype == torch.bfloat16 else "float32"  # float16 is widened to float32 on a CPU


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: a @ b, device)


def _copy_rate(device: str) -> float:
    count = 1 << (30 if device == "cuda" else 26)  # bytes, several times any cache
    source, target = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * count / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(function, device: str) -> float:
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
