"""Argument checks that every op makes, and the errors they raise: what was given, what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def floating(op: str, name: str, value: object) -> None:
    tensor(op, name, value)
    if value.dtype not in FLOATS:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise TypeError(f"{op}: {name} has dtype {value.dtype}; accepted are {accepted}")


def same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{op}: {name} is on {value.device}, {other_name} on {other.device}; move one to the other's")


def same_dtype(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, {other_name} {other.dtype}; cast one to the other's")


def autocast(value: Tensor | None) -> Tensor | None:
    """Under torch.autocast, a floating tensor in the region's dtype, as matrix products there take it."""
    if value is None or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    kind = value.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):  # "meta" has none
        return value
    return value.to(torch.get_autocast_dtype(kind))
