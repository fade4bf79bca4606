"""Which implementation serves a call, and why.

A hot path is a folder of `mmkernels.ops`; its backends are the modules in it that bear a backend's name ("flash-attn"
is flash_attn.py). Such a module holds the op's kernels as functions and says what it cannot do:

    unsupported(*call) -> str | None         # None: it serves this call; else the reason, for the user to read

where `call` begins with the op's tensors, which decide for most, and goes on with what else an op hands to `select`.

A backend named explicitly, by argument, by `use_backend` or by the environment variable MMKERNELS_BACKEND, runs or
raises with the reason. Without one, `auto` takes the first of `AUTO_ORDER` that supports the call; when only the plain
PyTorch reference is left, that is said once as a warning, since speed is what the caller came for.

"flash-attn" is somebody else's kernels, behind our contract. It serves who names it, and enters `AUTO_ORDER` on the day
a committed measurement puts it there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from . import _installation
from ._warnings import warn

NAMES = ("cuda", "triton", "flash-attn", "cpu", "reference")

# With the public functions of each, as the command line and the reports name and order them.
HOT_PATHS = {
    "contrastive": ("clip_loss", "siglip_loss"),
    "patch_embed": ("patch_embed",),
    "span_attention": ("span_attention",),
    "rotary_embed": ("rotary_embed",),
    "similarity": ("nearest_code", "max_similarity"),
}

# Fastest first, by the kind of device the tensors are on. The CPU's order is measured (benchmarks/results); no GPU has
# been measured yet, so there the compiled kernels simply come before the reference.
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

OLDEST_TRITON = (3, 4)  # before it, a kernel cannot index a tuple of tiles
NO_GPU_FOR_TRITON = (
    "torch sees no GPU; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly, for checking"
)

MODULE_ATTRIBUTE = "_mmkernels_backend"

_override: str | None = None


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot serve this call; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """What one backend says to one call: `reason` is None when it can serve it."""

    backend: str
    chosen: bool
    reason: str | None

    @property
    def state(self) -> str:
        return "chosen" if self.chosen else "usable" if self.reason is None else f"not usable: {self.reason}"

    def __str__(self) -> str:
        return f"{self.backend:<10} {self.state}"


class Explanation(tuple[Candidate, ...]):
    """The candidates of a call, in the order of `NAMES`; printing it gives a line each."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self))


class _Explained(Exception):
    """Carries an `Explanation` out of the call that `explain` makes."""


_explaining = False


def requested(backend: str | None) -> str:
    """The backend a public function was asked for: its argument, else `use_backend`'s, else "auto"."""
    name = backend or _override or "auto"
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every call inside the `with` block, of any thread, by `backend` ("auto" for the usual choice).

    A call's own `backend=` argument wins. The backward pass keeps the backend its forward pass was given.
    """
    global _override
    previous, _override = _override, requested(backend)
    try:
        yield
    finally:
        _override = previous


def of_module(module: torch.nn.Module) -> str | None:
    """The backend that `accelerate(model, backend=...)` gave this module of the model; None: the fastest."""
    return getattr(module, MODULE_ATTRIBUTE, None)


def explain(op, *args, **kwargs) -> Explanation:
    """Say what each backend makes of the call `op(*args, **kwargs)`, without running it.

    `op` is a public function of mmkernels or its name; the arguments are checked as in a real call.
    """
    global _explaining
    if isinstance(op, str):
        op = getattr(importlib.import_module("mmkernels"), op)
    _explaining = True
    try:
        op(*args, **kwargs)
    except _Explained as answer:
        return answer.args[0]
    finally:
        _explaining = False
    raise TypeError(f"explain: {op!r} is not an op of mmkernels")


def considered(requested: str, device: str, *names: str) -> bool:
    """Whether one of the backends `names` may come to serve such a call on a kind of device, or be asked about it: what
    a kernel needs beside the tensors is made for those only. Under torch.compile the environment is not looked at."""
    if requested == "auto" and not torch.compiler.is_compiling():
        requested = os.environ.get("MMKERNELS_BACKEND", "") or "auto"
    order = AUTO_ORDER.get(device, ()) if requested == "auto" else (requested,)
    return _explaining or any(name in order for name in names)


def select(op: str, requested: str, *call: object) -> ModuleType:
    """The module that serves a call of the hot path `op`; `call` is what its backends' `unsupported` takes, and begins
    with a tensor, which says on which device."""
    if requested == "auto":
        requested = os.environ.get("MMKERNELS_BACKEND", "") or "auto"
        if requested != "auto" and requested not in NAMES:
            raise ValueError(f"MMKERNELS_BACKEND must be one of {', '.join(NAMES)}, or 'auto', got {requested!r}")
    if _explaining:
        raise _Explained(_candidates(op, requested, *call))
    if requested != "auto":
        reason = _reason(op, requested, *call)
        if reason is not None:
            raise BackendUnavailable(f"{op}: backend {requested!r} cannot serve this call: {reason}")
        return _load(op, requested)
    for name in AUTO_ORDER.get(call[0].device.type, ("reference",)):
        if name == "reference":
            _warn_slow(op, call[0].device.type, call[0].dtype)
        if _reason(op, name, *call) is None:
            return _load(op, name)
    raise AssertionError("the reference serves every call")


def has_kernel(op: str, *tensors: torch.Tensor) -> bool:
    """Whether a call on these tensors is served by more than the plain PyTorch reference, or by what the user asked
    for; else code that has one of its own had better run that."""
    if requested(None) != "auto" or os.environ.get("MMKERNELS_BACKEND"):
        return True
    order = AUTO_ORDER.get(tensors[0].device.type, ())
    return any(name != "reference" and _reason(op, name, *tensors) is None for name in order)


@functools.cache
def missing(backend: str) -> str | None:
    """Why `backend` cannot run on this machine at all, and what mends it; None when it can."""
    return _MISSING[backend]()


def cuda_is_emulated() -> bool:
    """Whether the CUDA kernels here are those that the tests compile for the CPU."""
    return missing("cuda") is None and importlib.import_module("mmkernels._cuda").emulated


def _candidates(op: str, requested: str, *call: object) -> Explanation:
    reasons = {name: _reason(op, name, *call) for name in NAMES}
    order = AUTO_ORDER.get(call[0].device.type, ("reference",)) if requested == "auto" else (requested,)
    chosen = next((name for name in order if reasons[name] is None), None)
    return Explanation(Candidate(name, name == chosen, reasons[name]) for name in NAMES)


def _reason(op: str, name: str, *call: object) -> str | None:
    if not is_written(op, name):
        return f"it has no kernels of {op}"
    return missing(name) or _load(op, name).unsupported(*call)


@functools.cache
def is_written(op: str, name: str) -> bool:
    """Whether a backend has kernels of the hot path `op`, here or elsewhere."""
    return importlib.util.find_spec(_module(op, name)) is not None


@functools.cache
def _load(op: str, name: str) -> ModuleType:
    return importlib.import_module(_module(op, name))


def _module(op: str, name: str) -> str:
    return f"mmkernels.ops.{op}.{name.replace('-', '_')}"


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; mend: pip install triton"
    version = importlib.import_module("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        return f"triton is {version}; the kernels need {'.'.join(map(str, OLDEST_TRITON))}: take torch 2.8 or later"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return NO_GPU_FOR_TRITON
    return None


def _missing_flash_attn() -> str | None:
    return importlib.import_module("mmkernels.ops._flash_attn").missing()


def _missing_core() -> str | None:
    try:
        importlib.import_module("mmkernels._core")
    except ImportError as error:
        return _not_built("core", error)
    return None


@functools.cache
def _missing_cuda() -> str | None:
    try:
        module = importlib.import_module("mmkernels._cuda")
    except ImportError as error:
        return _not_built("cuda", error)
    return None if module.emulated else _unusable_gpu(module)


_MISSING = {
    "cuda": _missing_cuda,
    "triton": _missing_triton,
    "flash-attn": _missing_flash_attn,
    "cpu": _missing_core,
    "reference": lambda: None,
}


def _unusable_gpu(module: ModuleType) -> str | None:
    """Why the CUDA kernels that were built run nowhere here."""
    driver, runtime = module.versions()
    version = f"{runtime // 1000}.{runtime % 1000 // 10}"
    built = f"built for {', '.join(f'sm_{name}' for name in module.architectures)} by CUDA {version}, but "
    if torch.version.cuda is None:
        return f"{built}torch {torch.__version__} is a build without CUDA; mend: install one with, from pytorch.org"
    if driver == 0:
        return f"{built}there is no NVIDIA driver; mend: install one, of CUDA {runtime // 1000} or later"
    if driver // 1000 < runtime // 1000:
        return (
            f"{built}the driver is of CUDA {driver // 1000}.{driver % 1000 // 10}; mend: update the driver, or "
            f"reinstall with an nvcc of CUDA {driver // 1000}"
        )
    if not torch.cuda.is_available():
        return f"{built}torch sees no GPU; mend: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def _not_built(part: str, error: ImportError) -> str:
    found = _installation.left_out(part)
    mend = f"{found['mend']}, then {_installation.reinstall()}" if found else _installation.reinstall()
    return f"{found.get('reason') or error}; mend: {mend}"


@functools.cache
def _warn_slow(op: str, device: str, dtype: torch.dtype) -> None:
    """Once for each kind of call; what is in the way is worked out by `explain`."""
    warn(
        f"mmkernels: {' and '.join(HOT_PATHS[op])}, on {device} tensors of {dtype}: served by the plain PyTorch "
        "reference, no faster than eager code; mmkernels.explain(...) says why, `mmkernels info` what is missing here"
    )
