"""Attention that no finder knows: named in the report, so that nobody takes it for swapped."""

from __future__ import annotations

from functools import cache

from torch import nn

from .code_words import authored, methods, reaches
from .swap import plain_class

_WORDS = {"softmax", "scaled_dot_product_attention", "Softmax"}


def why_left(module: nn.Module) -> str | None:
    """None for what does not look like attention."""
    cls = plain_class(module)
    if not any(word in cls.__name__ for word in ("Attention", "Attn")) or cls.__module__.startswith("mmkernels."):
        return None
    has_softmax = any(isinstance(child, nn.Softmax) for child in module.children())
    return "written out in the model, and not known to mmkernels" if has_softmax or _attends(cls) else None


@cache
def _attends(cls: type) -> bool:
    """Whether its code, or a helper's in the same file, names what attention is made of."""
    return any(reaches(authored(method), lambda word, _: word in _WORDS) for method in methods(cls).values())
