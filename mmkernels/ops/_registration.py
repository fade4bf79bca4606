"""How an op becomes one of torch's: schema, implementation, and shapes for tracing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_library = torch.library.Library("mmkernels", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define torch.ops.mmkernels.<schema> and return its default overload, bound once for the calls to come.

    `implementation` serves every device; its first argument is a tensor. `fake` gives empty results.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, _outside_autocast(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmkernels::{name}", fake, lib=_library)
    return getattr(torch.ops.mmkernels, name).default


def _outside_autocast(implementation: Callable) -> Callable:
    """An op has chosen its dtypes when it runs; torch's functions inside it must not be cast once more."""

    @functools.wraps(implementation)
    def call(tensor, *args):
        kind = tensor.device.type
        if not torch.is_autocast_enabled(kind):
            return implementation(tensor, *args)
        with torch.autocast(kind, enabled=False):
            return implementation(tensor, *args)

    return call
