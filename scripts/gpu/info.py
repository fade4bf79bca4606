"""What is here: versions, the GPU, which backends run, and whether the GPU multiplies at all."""

from __future__ import annotations

import subprocess
from functools import partial

import torch

from mmkernels import backends
from mmkernels.bench.machine import environment
from mmkernels.check.session import Request, places

from .pool import Row

SECONDS, ROW_SECONDS, WORKERS = 60, 60, 1


def rows(device: str) -> list[Row]:
    return [Row("machine", partial(machine, device))]


def machine(device: str) -> dict:
    result = {"env": environment(), "backends": {place.label: place.state for place in places(Request(device=device))}}
    wrong = [backends.missing("triton")]
    if device == "cuda":
        if not torch.cuda.is_available():
            return result | {"failure": "torch sees no GPU", "stop": True}
        properties = torch.cuda.get_device_properties(0)
        names = ("multi_processor_count", "total_memory", "L2_cache_size", "major", "minor")
        result["gpu"] = {name: getattr(properties, name, None) for name in names}
        result["driver"] = driver()
        x = torch.randn(512, 512, device="cuda")
        wrong.append(None if torch.isfinite(x @ x).all() else "a matrix product on the GPU fails")
        missing = backends.missing("cuda")  # but where it was left out on purpose, which the build has said
        wrong.append(missing if missing and "left out" not in missing else None)
    failures = list(filter(None, wrong))
    return result | ({"failure": "; ".join(failures)} if failures else {})


def driver() -> str | None:
    """What nvidia-smi says of the card as it was found."""
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def told(results: dict[str, dict]) -> list[str]:
    found = results.get("machine", {})
    if "env" not in found:
        return []
    env, gpu = found["env"], found.get("gpu", {})
    names = ("torch", "triton", "flash-attn", "cuda", "python", "date")
    versions = ", ".join(f"{name} {env[name] or 'none'}" for name in names)
    lines = [f"{env['gpu'] or env['cpu']}, {gpu.get('multi_processor_count', 'no')} multiprocessors; {versions}"]
    lines += [f"  {line}" for line in (found.get("driver") or "").splitlines()]
    return lines + [f"  {name}: {state}" for name, state in found["backends"].items()]
