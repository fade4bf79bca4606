"""What the code of a class names: how finders tell what a module does without running it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator

from torch import nn


def methods(cls: type) -> dict[str, object]:
    """Those of a class and what it inherits, torch.nn.Module's left out."""
    found: dict[str, object] = {}
    for base in cls.__mro__:
        if base is not nn.Module and base is not object:
            for name, method in vars(base).items():
                found.setdefault(name, method)
    return found


def authored(method: object) -> types.FunctionType | None:
    """The function that its author wrote, within its decorators; None: it is no function."""
    method = getattr(method, "__func__", method)  # of static and class methods
    while isinstance(method, types.FunctionType) and "__wrapped__" in vars(method):
        method = vars(method)["__wrapped__"]
    return method if isinstance(method, types.FunctionType) else None


def words(code: types.CodeType) -> Iterator[str]:
    """Names of variables, attributes and keyword arguments in a function's code."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from words(constant)
        elif isinstance(constant, tuple):  # keyword arguments
            yield from (x for x in constant if isinstance(x, str))


def reaches(
    function: types.FunctionType | None, wanted: Callable[[str, object], bool], seen: frozenset = frozenset()
) -> bool:
    """Whether a function, or one of its file that it calls, has a word that is wanted: `wanted` gets the word, and what
    stands under it in the file (None: nothing)."""
    if function is None or function in seen:
        return False
    for word in words(function.__code__):
        value = function.__globals__.get(word)
        if wanted(word, value):
            return True
        helper = authored(value)
        is_of_the_file = helper is not None and helper.__globals__ is function.__globals__
        if is_of_the_file and reaches(helper, wanted, seen | {function}):
            return True
    return False
