"""Argument checks that every op makes, and the errors they raise: what was given, what is accepted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CAST = (torch.float32, torch.bfloat16, torch.float16)  # by autocast


def in_words(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{op}: {name} is a DTensor, and no rule says how this op runs on its shards; give {name}.to_local(), or "
            f"{name}.full_tensor() where the op needs all of it"
        )


def floating(op: str, name: str, value: object) -> None:
    tensor(op, name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {value.dtype}; accepted are {in_words(FLOATS)}")


def one_of(op: str, name: str, value: object, accepted: Iterable[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{op}: {name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")


def same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{op}: {name} is on {value.device}, {other_name} on {other.device}; move one to the other's")


def same_dtype(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, {other_name} {other.dtype}; cast one to the other's")


def autocast(first: Tensor, *rest: Tensor | None) -> Sequence[Tensor | None]:
    """Under torch.autocast, floating tensors in the region's dtype, as matrix products there take them.

    They are on the device of the first, or are refused later."""
    kind = first.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):  # "meta" has none
        return (first, *rest)
    dtype = torch.get_autocast_dtype(kind)
    return [x if x is None or x.dtype not in _CAST else x.to(dtype) for x in (first, *rest)]
