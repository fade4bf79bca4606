"""When a module is not run, but read by a tracer: then a drop-in computes as the module whose place it takes, in
operations that every reader of the graph knows."""

from __future__ import annotations

import torch


def is_exported() -> bool:
    """By torch.jit.trace, or to ONNX."""
    return torch.onnx.is_in_onnx_export() if torch.compiler.is_compiling() else torch.jit.is_tracing()


def is_traced(*inputs: object) -> bool:
    """By one of these, or by torch.fx."""
    return is_exported() or any(isinstance(x, torch.fx.Proxy) for x in inputs)
