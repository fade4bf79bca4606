"""Attention over a long sequence, bfloat16, ours beside the fastest kernels that are here: cuDNN's, and flash-attn's or
torch's build of them, which add up gradients in any order (varlen) or in a fixed one (our backend "flash-attn").

What the machine code allows ours, of the tensor cores' cycles: forward 0.97 at D = 64, bound by exponentials, and all
at D = 128; backward, where five of seven products count, 0.66 and 0.71. Of FlashAttention-3's rate backward 0.85 to
0.89 is expected, of that in a fixed order 1.0.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmkernels.backends import BackendUnavailable
from mmkernels.bench.cases import OPS as MEASURED
from mmkernels.bench.gate import judge
from mmkernels.bench.op import Truth, Values
from mmkernels.bench.span_attention import AttentionCase, attend, peers
from mmkernels.bench.span_attention_layouts import Layout, documents, full
from mmkernels.check.draw import Draw
from mmkernels.check.op import Call, evaluate
from mmkernels.check.precision import exact_float32

from . import timing
from .pool import Row
from .table import table

SECONDS, ROW_SECONDS, WORKERS = 100, 45, 1
AT_MOST = {("fwd", 64): 0.97, ("fwd", 128): 1.0, ("bwd", 64): 0.66, ("bwd", 128): 0.71}
SDPA = {"SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA, flash": SDPBackend.FLASH_ATTENTION}


def rows(device: str) -> list[Row]:
    """Of each size ours and the strongest first, and last what the profiler says of our kernels."""
    ours, dims = ("mmkernels:cuda", (128, 64)) if device == "cuda" else ("mmkernels:cpu", (64,))
    names = [ours, *SDPA, "flash-attn varlen", "torch varlen", "mmkernels:flash-attn", "mmkernels:triton"]
    found = []
    for seen, dim in product(("causal", "full"), dims):
        found += [Row(f"{dim}|{seen}|{name}", partial(measure, dim, seen, name, device)) for name in names]
        if device == "cuda":
            found.append(Row(f"{dim}|{seen}|kernels", partial(kernels, dim, seen, device)))
    return found


def case(dim: int, seen: str, device: str) -> AttentionCase:
    tokens, heads = (16384, 16) if device == "cuda" else (64, 2)
    layout = documents((tokens,)) if seen == "causal" else full(tokens, tokens)
    return AttentionCase(f"{seen}-{tokens}", layout, (heads, heads), dim)


@functools.lru_cache(maxsize=1)
def drawn(dim: int, seen: str, device: str) -> tuple[Call, Tensor]:
    size = case(dim, seen, device)
    draw = Draw(0, size.op, size.name)
    call = size.make(draw, torch.bfloat16, device)
    return call, size.upstream(draw, call)


@functools.lru_cache(maxsize=1)
def right(dim: int, seen: str, device: str) -> tuple[Truth, Values]:
    """The truth, and what SDPA makes of it."""
    (call, upstream), measured = drawn(dim, seen, device), MEASURED["span_attention"]
    return measured.truth(call, upstream), evaluate(sdpa, call, measured.op, upstream)


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=layout.causal)[0].transpose(0, 1)


def sdpa_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    with sdpa_kernel(kernel):
        return sdpa(q, k, v, layout)


def contender(name: str, call: Call) -> Callable[..., Tensor] | None:
    """A function of the op's arguments, if there is one."""
    if name.startswith("mmkernels:"):
        return partial(attend, backend=name.removeprefix("mmkernels:"))
    if name in SDPA:
        return partial(sdpa_by, SDPA[name])
    return {peer.name: peer.function for peer in peers(call)}.get(name)


def measure(dim: int, seen: str, name: str, device: str) -> dict:
    """A peer that does not run is left out; that ours does not is a failure."""
    with exact_float32():
        if name == "flash-attn varlen" and importlib.util.find_spec("flash_attn") is None:
            return {"skipped": "flash-attn is not installed"}
        call, upstream = drawn(dim, seen, device)
        function = contender(name, call)
        if function is None:
            return {"skipped": "is not here"}
        truth, plain = right(dim, seen, device)
        is_ours, result = name.startswith("mmkernels:"), {}
        op = MEASURED["span_attention"].op
        try:
            for direction, run in timing.passes(op, function, call, upstream).items():
                worst = judge(run(), plain, truth, call, op.name, is_ours)
                flops = case(dim, seen, device).flops(direction)
                seconds = 0.5 if device == "cuda" else 0.05
                result[direction] = timing.timed(run, device, seconds, flops) | {"error_of_budget": worst.ratio}
                if is_ours and worst.failure():
                    result["failure"] = worst.failure()
        except BackendUnavailable as reason:
            return {"skipped": str(reason)}
        except Exception as reason:
            if is_ours:
                raise
            return {"skipped": f"{type(reason).__name__}: {reason}"}
        result["bwd"] = backward(result, case(dim, seen, device), device)
    return result


def backward(result: dict, size: AttentionCase, device: str) -> dict:
    """What the backward pass adds."""
    ms = result["fwd_bwd"]["ms"] - result["fwd"]["ms"]
    flops = size.flops("fwd_bwd") - size.flops("fwd")
    mhz = result["fwd_bwd"]["clock_mhz"]
    return {"ms": ms, "tflops": flops / (ms * 1e9), "share": timing.share(flops, ms, mhz, device)}


def kernels(dim: int, seen: str, device: str) -> dict:
    """Milliseconds by kernel, forward and backward."""
    call, upstream = drawn(dim, seen, device)
    run = timing.passes(MEASURED["span_attention"].op, contender("mmkernels:cuda", call), call, upstream)["fwd_bwd"]
    with timing.Clock(device) as clock:
        return {"kernels": timing.kernels(run), "clock_mhz": clock.mhz}


def told(results: dict[str, dict]) -> list[str]:
    lines, said = [], []
    for name, result in results.items():
        dim, seen, by = name.split("|")
        if by == "kernels" and "kernels" in result:
            own = sorted(result["kernels"].items(), key=lambda item: -item[1])[:5]
            said.append(f"  kernels, D {dim}, {seen}: " + ", ".join(f"{kernel} {ms:.3f} ms" for kernel, ms in own))
        if "bwd" not in result:
            continue
        line = [dim, seen, by]
        for direction in ("fwd", "bwd"):
            found = result[direction]
            most = AT_MOST.get((direction, int(dim))) if by == "mmkernels:cuda" else None
            line += [found["ms"], found["tflops"], found["share"], most]
        lines.append([*line, result["fwd_bwd"]["clock_mhz"], result["fwd_bwd"]["error_of_budget"]])
    if not lines:
        return []
    heading = ["D", "seen", "by", "fwd ms", "TFLOP/s", "share", "at most"]
    heading += ["bwd ms", "TFLOP/s", "share", "at most", "MHz", "error/budget"]
    return ["Attention, bfloat16; share of the tensor cores' cycles", *table(heading, lines), *said]
