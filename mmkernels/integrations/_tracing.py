"""Swapped modules where a model runs to be traced, or transformed, and not to compute."""

from __future__ import annotations

import torch
from torch.fx import Proxy

from ..nn._tracing import is_exported
from .swap import plain_class


def is_traced() -> bool:
    """By torch.jit.trace, an exporter to ONNX, or a transform of torch.func: then what is swapped runs the plain
    module's own code. A graph is to hold operations that run anywhere, and what a mask says cannot be read under vmap.
    """
    if torch.compiler.is_compiling():
        return is_exported()
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


class Drawn:
    """Mixed in before the rest. What draws a graph of a model finds what it finds of the plain module: torch.fx, for
    which the modules of torch.nn are leaves, the module; what traces or transforms, the operations of torch.
    """

    def forward(self, *args, **kwargs):
        if is_traced():
            return plain_class(self).forward(self, *args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                path = value.tracer.path_of_module(self)
                return value.tracer.create_proxy("call_module", path, args, kwargs)
        return super().forward(*args, **kwargs)
