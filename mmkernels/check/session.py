"""Which backends are checked on which device, and running them: here, or in a process of their own.

Triton reads TRITON_INTERPRET when it is imported, so without a GPU its kernels are checked by a second process that
has it set, beside this one, on the quick cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import backends
from .suite import run_case, select


@dataclass(frozen=True)
class Place:
    backend: str
    device: str
    interpreted: bool = False  # in a process of its own, by Triton's interpreter
    missing: str | None = None

    @property
    def label(self) -> str:
        return f"{self.backend}, interpreted" if self.interpreted else self.backend


@dataclass(frozen=True)
class Request:
    op: str | None = None
    case: str | None = None
    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    quick: bool = False

    def cases(self, place: Place) -> list:
        quick = self.quick or (interpreting(place) and self.case is None)
        return list(select(self.op, self.case, self.dtype, quick))


def interpreting(place: Place) -> bool:
    return place.backend == "triton" and place.device == "cpu"


def places(request: Request) -> list[Place]:
    devices = [request.device] if request.device else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    names = [request.backend] if request.backend else list(backends.NAMES)
    return [place for name in names for place in _places_of(name, devices)]


def _places_of(backend: str, devices: list[str]) -> list[Place]:
    served = {"reference": ("cpu", "cuda"), "cpu": ("cpu",), "triton": ("cuda", "cpu")}.get(backend, ("cuda",))
    if backend == "cuda" and backends.cuda_is_emulated():
        served = ("cpu",)
    here = [device for device in served if device in devices]
    if backend == "triton":
        here = [device for device in here if device == "cuda" or not torch.cuda.is_available() or len(devices) == 1]
        if here == ["cpu"] and os.environ.get("TRITON_INTERPRET") != "1" and _triton_installed():
            return [Place(backend, "cpu", interpreted=True)]
    missing = backends.missing(backend)
    if not here:
        return [Place(backend, devices[0], missing=missing or f"it does not serve {' or '.join(devices)} tensors")]
    return [Place(backend, device, missing=missing) for device in here]


def _triton_installed() -> bool:
    return "not installed" not in (backends.missing("triton") or "")


class Interpreter:
    """The second process: `mmkernels check` on the triton backend with TRITON_INTERPRET=1."""

    def __init__(self, place: Place, request: Request):
        self.place = place
        self._file = Path(tempfile.mkdtemp(prefix="mmkernels-check-")) / "outcomes.json"
        words = [
            "check",
            "--backend",
            "triton",
            "--device",
            "cpu",
            "--seed",
            str(request.seed),
            "--json",
            str(self._file),
        ]
        for name in ("op", "case", "dtype"):
            if getattr(request, name):
                words += [f"--{name}", getattr(request, name)]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mmkernels", *words, *(["--quick"] if request.quick else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stop(self) -> None:
        self._process.terminate()
        self.records()

    def records(self) -> list[dict]:
        """Wait, and return the outcomes; those of a process that died are one failure."""
        printed, _ = self._process.communicate()
        try:
            return json.loads(self._file.read_text())["outcomes"]
        except OSError:
            lines = printed.strip().splitlines()[-3:]
            failure = f"the interpreter's process ended with code {self._process.returncode}: {' | '.join(lines)}"
            return [_crash(self.place, failure)]
        finally:
            self._file.unlink(missing_ok=True)
            self._file.parent.rmdir()


def run(request: Request, found: list[Place], step: Callable[[str, int, int], None]) -> list[dict]:
    """Check every place that is there; `step(label, done, total)` hears of the progress. Returns records.

    An interrupt ends it early and counts as a failure; the outcomes until then are there.
    """
    runnable = [place for place in found if place.missing is None]
    beside = [Interpreter(place, request) for place in runnable if place.interpreted]
    work = [(place, *job) for place in runnable if not place.interpreted for job in request.cases(place)]
    records: list[dict] = []
    try:
        for done, (place, case, dtype) in enumerate(work):
            step(f"{case.op} on {place.label}", done, len(work))
            records.append(run_case(case, dtype, place.backend, place.device, request.seed).record())
        for process in beside:
            step(f"waiting for Triton's interpreter on {len(request.cases(process.place))} cases", len(work), len(work))
            records += process.records()
    except KeyboardInterrupt:
        for process in beside:
            process.stop()
        where = runnable[0] if not work else work[min(len(records), len(work) - 1)][0]
        records.append(_crash(where, f"interrupted after {len(records)} of {len(work)} cases"))
    return records


def _crash(place: Place, failure: str) -> dict:
    unknown = {"op": "all", "case": "all", "dtype": "all", "seed": 0, "unsupported": None, "quantities": []}
    command = f"mmkernels check --backend {place.backend} --device {place.device}"
    return unknown | {"backend": place.backend, "device": place.device, "failures": [failure], "reproduce": command}
