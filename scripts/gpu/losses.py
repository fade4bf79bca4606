"""The contrastive losses on the batch of a large training run, bfloat16, by our kernels: is it the tensor cores that
limit them, or the L2 cache?

What the machine code allows: in all passes over tiles, at every width, the products take longer than what is done
beside them, so that all of the tensor cores' cycles could be used; but tiles ask the L2 cache for 48 bytes a cycle and
multiprocessor then, which leaves 0.83 of them if 40 come, and 0.6 if 29 do. Where SigLIP's passes with and without
gradients, one with twice the work beside the products, take the same time, the cache is the limit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from mmkernels.bench.cases import OPS as MEASURED
from mmkernels.bench.contrastive import LossCase
from mmkernels.bench.gate import judge, plain_values
from mmkernels.bench.op import Truth, Values
from mmkernels.check.draw import Draw
from mmkernels.check.op import Call, evaluate
from mmkernels.check.precision import exact_float32

from . import timing
from .pool import Row
from .table import table

SECONDS, ROW_SECONDS, WORKERS = 80, 45, 1
EXPECTED = "at most 0.83 if the L2 cache gives 40 bytes a cycle, 0.60 if 29"
OPS = ("siglip_loss", "clip_loss")
TILE_PASSES = {  # over all tiles of the logits, each a product; the gradients of features are cuBLAS's
    ("siglip_loss", "fwd"): 1,
    ("siglip_loss", "fwd_bwd"): 1,
    ("clip_loss", "fwd"): 1,
    ("clip_loss", "fwd_bwd"): 2,
}


def rows(device: str) -> list[Row]:
    """Of each size the times, then what the profiler says of our kernels, which is worth less."""
    widths, ours = ((512, 768, 1024), ("cuda", "triton")) if device == "cuda" else ((64,), ("cpu", "triton"))
    found = []
    for width, op in product(widths, OPS):
        found += [Row(f"{op} {width} {backend}", partial(measure, op, width, backend, device)) for backend in ours]
        if device == "cuda":
            found.append(Row(f"{op} {width} kernels", partial(kernels, op, width, device)))
    return found


def case(op: str, width: int, device: str) -> LossCase:
    return LossCase(op, 32768 if device == "cuda" else 64, width)


@functools.lru_cache(maxsize=1)
def drawn(op: str, width: int, device: str) -> tuple[Call, torch.Tensor]:
    size = case(op, width, device)
    draw = Draw(0, op, size.name)
    call = size.make(draw, torch.bfloat16, device)
    return call, size.upstream(draw, call)


@functools.lru_cache(maxsize=1)
def right(op: str, width: int, device: str) -> tuple[Truth, Values]:
    """The truth, and what eager code makes of it."""
    call, upstream = drawn(op, width, device)
    eager = MEASURED[op].peers(call)[0].function
    values = evaluate(eager, call, MEASURED[op].op, upstream)
    return MEASURED[op].truth(call, upstream), plain_values(values, eager, call, op)


def runs(op: str, call: Call, upstream: torch.Tensor, backend: str) -> dict[str, Callable]:
    return timing.passes(MEASURED[op].op, MEASURED[op].op.call, call, upstream, backend=backend)


def measure(op: str, width: int, backend: str, device: str) -> dict:
    """Forward alone and with gradients, and how far from the truth."""
    with exact_float32():
        call, upstream = drawn(op, width, device)
        truth, plain = right(op, width, device)
        result: dict = {}
        for direction, function in runs(op, call, upstream, backend).items():
            worst = judge(function(), plain, truth, call, op, True)
            flops = case(op, width, device).flops(direction)
            seconds = 0.7 if device == "cuda" else 0.05
            result[direction] = timing.timed(function, device, seconds, flops) | {"error_of_budget": worst.ratio}
            if worst.failure():
                result["failure"] = worst.failure()
    return result


def kernels(op: str, width: int, device: str) -> dict:
    """Milliseconds by kernel; `share`: of the passes over tiles alone."""
    call, upstream = drawn(op, width, device)
    result: dict = {}
    for direction, function in runs(op, call, upstream, "cuda").items():
        with timing.Clock(device) as clock:
            found = timing.kernels(function)
        own = sum(ms for name, ms in found.items() if name.startswith("contrastive_sm90_kernel"))
        flops = TILE_PASSES[op, direction] * case(op, width, device).flops("fwd")
        share = timing.share(flops, own, clock.mhz, device) if own else None
        result[direction] = {"kernels": found, "tiles_ms": own, "clock_mhz": clock.mhz, "share": share}
    return result


def told(results: dict[str, dict]) -> list[str]:
    lines = []
    for name, result in results.items():
        op, width, backend = name.split()
        if backend == "kernels" or "fwd" not in result:
            continue
        alone = results.get(f"{op} {width} kernels", {})
        line = [op, width, backend]
        for direction in ("fwd", "fwd_bwd"):
            found = result[direction]
            tiles = alone.get(direction, {}).get("share") if backend == "cuda" else None
            line += [found["ms"], found["clock_mhz"], found["tflops"], found["share"], tiles, found["error_of_budget"]]
        lines.append(line)
    if not lines:
        return []
    heading = ["loss", "D", "by"]
    for direction in ("fwd", "f+b"):
        heading += [f"{direction} ms", "MHz", "TFLOP/s", "share", "tiles'", "error/budget"]
    said = f"Losses, bfloat16; share of the tensor cores' cycles, of the passes over tiles alone: {EXPECTED}"
    return [said, *table(heading, lines)]
