"""Does every kernel equal its reference on this device? The cases of `mmkernels check`, several at a time: most of the
time goes into compiling Triton's kernels, on one core each."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, groupby, zip_longest

from mmkernels.check.cases import CASES
from mmkernels.check.session import Request, places
from mmkernels.check.suite import name_of, run_case, select

from .pool import Row

SECONDS, ROW_SECONDS = 110, 60
WORKERS = min(os.cpu_count() or 1, 14)
DTYPES = ("bfloat16", "float32", "float16")


def rows(device: str) -> list[Row]:
    """What is likeliest to be wrong first: the small cases in the dtypes that are trained in, then the larger ones of
    the CUDA kernels, which cost no compilation, and the rest. Of each, all ops and backends in turn. Cases that reach
    beyond 2^31 are left to `check-OP`: they take gigabytes in each of the processes."""
    backends = ("cuda", "triton") if device == "cuda" else ("triton",)

    def group(backend: str, dtype: str, quick: bool) -> list[Row]:
        every = ((case, kind) for case, kind in select(dtype=dtype) if not case.name.startswith("beyond 2^31"))
        chosen = [(case, kind) for case, kind in every if case.quick == quick]
        return list(in_turn(_rows(of_op, backend, device) for _, of_op in groupby(chosen, key=lambda job: job[0].op)))

    found = [*in_turn(group(backend, dtype, True) for dtype in DTYPES[:2] for backend in backends)]
    if device == "cuda":
        found += group("cuda", "bfloat16", False)
        found += in_turn(group(backend, "float16", True) for backend in backends)
    return found


def rows_of_op(op: str, device: str) -> list[Row]:
    """All of it: every backend that is here, every case, every dtype; interpreted, the small ones."""
    request = Request(op=op, device=device, quick=device == "cpu")
    return [
        row
        for place in places(request)
        if place.missing is None
        for row in _rows(request.cases(place), place.backend, device)
    ]


def in_turn(lists: Iterable[Iterable[Row]]) -> Iterator[Row]:
    return filter(None, chain.from_iterable(zip_longest(*lists)))


_SEED = random.SystemRandom().randrange(2**31)


def _rows(jobs: Iterable, backend: str, device: str) -> list[Row]:
    asked = [(case.op, case.name, backend, name_of(dtype)) for case, dtype in jobs]
    return [Row("|".join(one), partial(measure, *one, device, _SEED)) for one in asked]


def measure(op: str, name: str, backend: str, dtype: str, device: str, seed: int) -> dict:
    """An outcome as `mmkernels check` records it."""
    ((case, kind),) = select(op, name, dtype)
    outcome = run_case(case, kind, backend, device, seed).record()
    return outcome | ({"failure": "; ".join(outcome["failures"])} if outcome["failures"] else {})


def told(results: dict[str, dict]) -> list[str]:
    lines = []
    order = [case.op for case in CASES]
    keys = sorted((name.split("|")[2:], order.index(name.split("|")[0]), name) for name in results)
    for (backend, dtype), of_pair in groupby(keys, key=lambda key: key[0]):
        parts = []
        for op, group in groupby(of_pair, key=lambda key: key[2].split("|")[0]):
            found = [results[name] for *_, name in group]
            served = [result for result in found if not result.get("unsupported")]
            passed = sum("failure" not in result for result in served)
            parts.append(f"{op} {passed} of {len(served)}" if served else f"{op} not served")
        lines.append(f"  {backend}, {dtype}: {', '.join(parts)} passed")
    reasons = {result["unsupported"] for result in results.values() if result.get("unsupported")}
    return lines + [f"  not served: {reason}" for reason in sorted(reasons)]
