"""What the source of an attention layer shows of its calls of attention."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types

import torch
from transformers import AttentionInterface, modeling_utils

from ..code_words import authored, methods, reaches


@functools.cache
def attending(cls: type) -> tuple[types.FunctionType, ...]:
    """The methods of a class that call attention by the interface."""
    functions = (authored(method) for method in methods(cls).values())
    return tuple(function for function in functions if is_of_a_model(function) and reaches(function, is_interface))


def is_of_a_model(function: types.FunctionType | None) -> bool:
    """Not of PreTrainedModel, where implementations are chosen and checked, and none is called."""
    return function is not None and function.__module__ != modeling_utils.__name__


def is_interface(_: str, value: object) -> bool:
    return isinstance(value, AttentionInterface)


@torch.compiler.assume_constant_result
@functools.cache
def keywords(cls: type) -> frozenset[str] | None:
    """What a layer itself names in its calls of attention, and does not only hand on from its caller; None: its source
    is not there."""
    calls = [call for function in attending(cls) for call in calls_of_attention(function)]
    return frozenset(keyword.arg for call in calls for keyword in call.keywords if keyword.arg) if calls else None


def calls_of_attention(function: types.FunctionType) -> list[ast.Call]:
    """Their first argument is the module itself."""
    calls = (node for node in ast.walk(_tree(function)) if isinstance(node, ast.Call) and node.args)
    return [call for call in calls if isinstance(call.args[0], ast.Name) and call.args[0].id == "self"]


def makes_its_mask(call: ast.Call, function: types.FunctionType) -> bool:
    """Whether the mask of a call is computed in the layer, and not chosen or cut from what the layer was given."""
    if len(call.args) > 4:
        mask = call.args[4]
    else:
        mask = next((keyword.value for keyword in call.keywords if keyword.arg == "attention_mask"), None)
    if not isinstance(mask, ast.Name):
        return mask is not None and not _is_chosen(mask)
    nodes = list(ast.walk(_tree(function)))
    changed = any(isinstance(x, ast.AugAssign) and _is_named(x.target, mask.id) for x in nodes)
    made = (x.value for x in nodes if isinstance(x, ast.Assign) and any(_is_named(t, mask.id) for t in x.targets))
    return changed or any(not _is_chosen(value) for value in made)


@functools.cache
def _tree(function: types.FunctionType) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


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
