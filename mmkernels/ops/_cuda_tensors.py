"""Handing tensors to the CUDA module: what it cannot serve, and launching on the right device and stream.

In the module that the tests build (`_cuda.emulated`) the same kernels run on tensors on the CPU.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _cuda, _installation
from ._checks import in_words

HALVES = (torch.bfloat16, torch.float16)
DEVICE = "cpu" if _cuda.emulated else "cuda"


def unsupported_tensor(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = HALVES) -> str | None:
    """Why the kernels cannot read the tensor `x`; None when they can."""
    if x.device.type != DEVICE:
        return f"it serves tensors on {DEVICE}, {name} is on {x.device}"
    if x.dtype not in dtypes:
        rest = "; the triton backend serves float32" if x.dtype == torch.float32 else ""
        return f"it serves {name} of {in_words(dtypes)}, not {x.dtype}{rest}"
    return _older_than_the_build(x.device)


def runs_on(capability: tuple[int, int], architectures: tuple[str, ...] = _cuda.architectures) -> bool:
    """Whether the build holds code for a device: machine code runs on its own major version's later ones, but for that
    of 100a and the like on one device alone; PTX on all later ones. 90a stands for 90, of all but *_sm90.cu."""
    major, minor = capability
    for name in architectures:
        own = name.removesuffix("+ptx")
        number = int(own.rstrip("af"))
        if number == 10 * major + minor:
            return True
        if number // 10 == major and number % 10 < minor and (own == "90a" or not own.endswith("a")):
            return True
        if name.endswith("+ptx") and number <= 10 * major + minor:
            return True
    return False


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of the emulator that of Hopper, whose kernels then run, or MMKERNELS_EMULATED_CAPABILITY."""
    if _cuda.emulated:
        major, minor = os.environ.get("MMKERNELS_EMULATED_CAPABILITY", "9.0").split(".")
        return int(major), int(minor)
    return torch.cuda.get_device_capability(device)


class Variant(NamedTuple):
    """Kernels of one generation alone: the launchers NAME_suffix, for what NAME_suffix_serves."""

    suffix: str
    capability: tuple[int, int]
    architecture: str  # that the build must hold


VARIANTS = (Variant("sm90", (9, 0), "90a"),)  # the newest first; what none of them serves, the kernels for all do


def launch(name: str, call: object, **tensors: Tensor) -> None:
    """The kernels of that name, on the current stream of the device that the call's tensors are on, made current.

    They are kept by the caller, and freed memory is given out again in the order of that stream."""
    (first, x), *rest = tensors.items()
    for other_name, other in rest:
        if other.device != x.device:
            raise ValueError(f"{name}: {other_name} is on {other.device}, {first} on {x.device}; move one")
    launcher = getattr(_cuda, name + _suffix(name, call, x.device))
    if _cuda.emulated:
        return launcher(call, 0)
    with torch.cuda.device(x.device):
        launcher(call, torch.cuda.current_stream(x.device).cuda_stream)


def _suffix(name: str, call: object, device: torch.device) -> str:
    for suffix, generation, architecture in VARIANTS:
        serves = getattr(_cuda, f"{name}_{suffix}_serves", None)
        built = {each.removesuffix("+ptx") for each in _cuda.architectures}
        if serves and capability(device) == generation and architecture in built and serves(call):
            return f"_{suffix}"
    return ""


@functools.cache
def _older_than_the_build(device: torch.device) -> str | None:
    if runs_on(capability(device)):
        return None
    major, minor = capability(device)
    built = ", ".join(_cuda.architectures)
    wanted = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    return (
        f"{device} is sm_{major}{minor}, the build holds code for {built}; mend: MMKERNELS_CUDA_ARCHS={wanted} "
        f"{_installation.reinstall()}"
        if (major, minor) >= (8, 0)
        else f"{device} is sm_{major}{minor}; the kernels need sm_80 or later: the triton backend may serve it"
    )
