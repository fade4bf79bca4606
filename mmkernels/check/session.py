"""Which backends are checked on which device, and running them: here, or in a process of their own.

Triton reads TRITON_INTERPRET when it is imported, so without a GPU its kernels are checked by a second process that
has it set, beside this one, on the quick cases.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import backends
from .._installation import IMPORTED_FROM
from .cases import OPS
from .suite import run_case, select

INTERPRETED = "there is no GPU to run it: `mmkernels check` runs its quick cases in Triton's interpreter, on the CPU"


@dataclass(frozen=True)
class Place:
    backend: str
    device: str
    interpreted: bool = False  # in a process of its own, by Triton's interpreter
    missing: str | None = None

    @property
    def label(self) -> str:
        return f"{self.backend}, interpreted" if self.interpreted else self.backend

    @property
    def state(self) -> str:
        """As `info` and the report of a check tell it."""
        if self.missing:
            return f"not there: {self.missing}"
        return INTERPRETED if interpreting(self) else "there"


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
        runs = backends.missing("triton") in (None, backends.NO_GPU_FOR_TRITON)  # in the interpreter at least
        if here == ["cpu"] and os.environ.get("TRITON_INTERPRET") != "1" and runs:
            return [Place(backend, "cpu", interpreted=True)]
    missing = backends.missing(backend)
    if not here:
        return [Place(backend, devices[0], missing=missing or f"it does not serve {' or '.join(devices)} tensors")]
    return [Place(backend, device, missing=missing) for device in here]


class Interpreter:
    """The second process: `mmkernels check` on the triton backend with TRITON_INTERPRET=1."""

    def __init__(self, place: Place, request: Request):
        self.place = place
        folder = Path(tempfile.mkdtemp(prefix="mmkernels-check-"))
        self._file, self._printed = folder / "outcomes.json", folder / "printed.txt"
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
        with self._printed.open("w") as printed:  # a pipe that nobody reads meanwhile would fill
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mmkernels", *words, *(["--quick"] if request.quick else [])],
                cwd=IMPORTED_FROM,
                env=environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
            )

    def stop(self) -> None:
        self._process.terminate()
        self.records()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def records(self) -> list[dict]:
        """Wait, and return the outcomes; those of a process that died are one failure."""
        self._process.wait()
        try:
            return json.loads(self._file.read_text())["outcomes"]
        except OSError:
            lines = self._printed.read_text().strip().splitlines()[-3:]
            failure = f"the interpreter's process ended with code {self._process.returncode}: {' | '.join(lines)}"
            return [_crash(self.place, failure)]
        finally:
            shutil.rmtree(self._file.parent)


def run(request: Request, found: list[Place], step: Callable[[str, int, int], None]) -> list[dict]:
    """Check every place that is there; `step(label, done, total)` hears of the progress. Returns records.

    An interrupt ends it early and is the last record, a failure; the outcomes until then are there.
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
            waiting = f"waiting for Triton's interpreter on {len(request.cases(process.place))} cases"
            step(waiting, len(work), len(work))
            while not process.wait(1.0):
                step(waiting, len(work), len(work))
            records += process.records()
    except KeyboardInterrupt:
        for process in beside:
            process.stop()
        where = runnable[0] if not work else work[min(len(records), len(work) - 1)][0]
        crash = _crash(where, f"interrupted after {len(records)} of {len(work)} cases")
        records.append(crash | {"interrupted": True})
    return records


def expected_seconds(request: Request, found: list[Place]) -> float | None:
    """About; None on a GPU, whose kernels are compiled first: nobody has measured that."""
    runnable = [place for place in found if place.missing is None]
    if any(place.device == "cuda" for place in runnable):
        return None
    here = beside = 0.0
    for place in runnable:
        seconds = sum(OPS[case.op].seconds[interpreting(place)] for case, _ in request.cases(place))
        here, beside = (here, beside + seconds) if place.interpreted else (here + seconds, beside)
    return max(here, beside)


def _crash(place: Place, failure: str) -> dict:
    unknown = {"op": "all", "case": "all", "dtype": "all", "seed": 0, "unsupported": None, "quantities": []}
    command = f"mmkernels check --backend {place.backend} --device {place.device}"
    return unknown | {"backend": place.backend, "device": place.device, "failures": [failure], "reproduce": command}
