"""What is a hot path in a model of transformers, and what is left to the model's own code, and why."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator

from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from ..finding import Finding
from ..swap import plain_class
from . import losses
from .attention import takes_the_place_of
from .exchange import attending, exchanged, prepares
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
        yield Finding(kind, parts=(mixin,))
    elif prepares(cls):
        yield Finding(None, parts=(exchanged,))


@functools.cache
def why_left(cls: type) -> str | None:
    """Why spans do not express what a class of attention computes; None: they do."""
    for function in attending(cls):
        for name, value in function.__globals__.items():
            if isinstance(value, AttentionInterface) and {"eager", *value._global_mapping} & {*value._local_mapping}:
                return f"its file has attention functions of its own in {name}"
        for call in _calls(function):
            brought = [keyword.arg for keyword in call.keywords if keyword.arg in _LEFT]
            if brought:
                return f"it {_LEFT[brought[0]]} ({brought[0]})"
            if _is_made(_mask_of(call), function):
                return "it makes a mask of its own, or changes the one it is given"
    return None


def _why_left_as_loaded(module: nn.Module) -> str | None:
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return None if takes_the_place_of(name) else f"the model attends by {name!r}, as it was asked to"


# ---- what the source of an attention layer shows


@functools.cache
def _tree(function: types.FunctionType) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _calls(function: types.FunctionType) -> list[ast.Call]:
    """Those of attention: their first argument is the module itself."""
    calls = (node for node in ast.walk(_tree(function)) if isinstance(node, ast.Call) and node.args)
    return [call for call in calls if isinstance(call.args[0], ast.Name) and call.args[0].id == "self"]


def _mask_of(call: ast.Call) -> ast.expr | None:
    if len(call.args) > 4:
        return call.args[4]
    return next((keyword.value for keyword in call.keywords if keyword.arg == "attention_mask"), None)


def _is_made(mask: ast.expr | None, function: types.FunctionType) -> bool:
    """Whether a value is computed here, and not chosen or cut from what the function was given."""
    if isinstance(mask, ast.Name):
        nodes = list(ast.walk(_tree(function)))
        changed = any(isinstance(x, ast.AugAssign) and _is_named(x.target, mask.id) for x in nodes)
        made = (x.value for x in nodes if isinstance(x, ast.Assign) and any(_is_named(t, mask.id) for t in x.targets))
        return changed or any(not _is_chosen(value) for value in made)
    return mask is not None and not _is_chosen(mask)


def _is_named(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_chosen(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return _is_chosen(value.body) and _is_chosen(value.orelse)
    if isinstance(value, ast.Subscript):
        return _is_chosen(value.value)
    if isinstance(value, ast.Call):  # of a dict's get
        return isinstance(value.func, ast.Attribute) and value.func.attr == "get"
    return isinstance(value, ast.Name | ast.Attribute | ast.Constant)


__all__ = ["find", "fits", "restored", "swapped"]
