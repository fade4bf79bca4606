"""What is a hot path in a model of transformers, and what is left to the model's own code, and why."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from .._tracing import Drawn
from ..finding import Finding
from ..swap import plain_class
from . import losses
from .attention import takes_the_place_of
from .documents import tells_documents
from .exchange import exchanged, prepares
from .layer_source import attending, calls_of_attention, makes_its_mask
from .modules import MODULES
from .own_config import give as swapped
from .own_config import take_back as restored

# Keywords of attention calls that spans do not express, and what they bring.
_LEFT = {
    "position_bias": "adds a bias of positions to its scores",
    "sinks": "has other sinks for each query",
    "indices": "chooses its keys by an indexer",
    "block_indices": "chooses its keys by an indexer",
}


def fits() -> str | None:
    return None


def find(module: nn.Module, path: str, parent: nn.Module | None) -> list[Finding]:
    return list(_find(module))


def _find(module: nn.Module) -> Iterator[Finding]:
    cls = plain_class(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if name in losses.LOSSES:
        yield Finding("loss", parts=(losses.LOSSES[name],))
    elif isinstance(module, PreTrainedModel):
        reason = losses.why_left(module)
        if reason is not None:
            yield Finding("loss", left=reason)
    mixin, kind = MODULES.get(name.removeprefix("transformers.models."), (None, None))
    if attending(cls):
        reason = why_left(cls) or _why_left_as_loaded(module)
        parts = (exchanged,) if mixin is None else (exchanged, mixin)
        yield Finding("attention", left=reason) if reason else Finding("attention", parts=parts)
    elif mixin is not None:
        yield Finding(kind, parts=(mixin, Drawn))
    elif prepares(cls):
        yield Finding(None, parts=(exchanged, tells_documents))


@functools.cache
def why_left(cls: type) -> str | None:
    """Why spans do not express what a class of attention computes; None: they do."""
    for function in attending(cls):
        for name, value in function.__globals__.items():
            if isinstance(value, AttentionInterface) and {"eager", *value._global_mapping} & {*value._local_mapping}:
                return f"its file has attention functions of its own in {name}"
        for call in calls_of_attention(function):
            brought = [keyword.arg for keyword in call.keywords if keyword.arg in _LEFT]
            if brought:
                return f"it {_LEFT[brought[0]]} ({brought[0]})"
            if makes_its_mask(call, function):
                return "it makes a mask of its own, or changes the one it is given"
    return None


def _why_left_as_loaded(module: nn.Module) -> str | None:
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return None if takes_the_place_of(name) else f"the model attends by {name!r}, as it was asked to"


__all__ = ["find", "fits", "restored", "swapped"]
