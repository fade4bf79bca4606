"""Swapped modules: what `accelerate` makes of a module, and the way back.

A swapped module is the same object with the same parameters, hooks and state; only its class is another: a subclass of
its own, of the same name and module, since that is what records of outputs, checkpoints and wrapping policies go by.
All that is known of the swap stands in that class. So nothing is kept on the model that goes stale when a layer is
moved, wrapped or made anew, and a part of a model, a deep copy and an unpickled model can be restored on their own.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch import nn

_ATTRIBUTE = "_mmkernels_swap"

Part = type | Callable[[type], type]  # a class to mix in before the plain one, or what makes a subclass of it


class Swap(NamedTuple):
    """plain: the class before; parts: what makes the class of it, importable, so that a module pickles; kinds: the hot
    paths it serves, each with the words of a report for it, if those are others (none: it only prepares what other
    modules are handed)."""

    plain: type
    parts: tuple[Part, ...]
    kinds: tuple[tuple[str, str | None], ...]


def swap_of(module: nn.Module) -> Swap | None:
    """None for a plain module, and for one whose class was changed again since, as by FSDP."""
    return vars(type(module)).get(_ATTRIBUTE)


def served_kinds(module: nn.Module) -> tuple[tuple[str, str | None], ...]:
    """The hot paths that it serves, whatever was made of its class since."""
    swap = getattr(type(module), _ATTRIBUTE, None)
    return () if swap is None else swap.kinds


def plain_class(module: nn.Module) -> type:
    """The class that the model's authors gave it."""
    swap = getattr(type(module), _ATTRIBUTE, None)
    return type(module) if swap is None else swap.plain


def is_wrapped(module: nn.Module) -> bool:
    """Whether its class was changed after it was swapped."""
    return swap_of(module) is None and hasattr(type(module), _ATTRIBUTE)


def swap(module: nn.Module, parts: tuple[Part, ...], kinds: tuple[tuple[str, str | None], ...]) -> None:
    """Adds to what was swapped before."""
    before = swap_of(module) or Swap(type(module), (), ())
    parts = dict.fromkeys((*before.parts, *parts))
    parts = tuple(sorted(parts, key=lambda part: isinstance(part, type)))  # mixins go before all that makes a subclass
    kinds = (*before.kinds, *(kind for kind in kinds if kind not in before.kinds))
    if (parts, kinds) != before[1:]:
        module.__class__ = _swapped_class(before.plain, parts, kinds)


def undo(module: nn.Module) -> None:
    module.__class__ = swap_of(module).plain


class _Swapped:
    def __new__(cls, *args, **kwargs):
        """type(model)(config) makes a plain model: nobody accelerated that one."""
        return getattr(cls, _ATTRIBUTE).plain(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        found = swap_of(self)
        if found is None:  # a class that was made of this one, which pickles as it likes
            return super().__reduce_ex__(protocol)
        # object's: copyreg.__newobj__, to be called with the class first, and the module's state
        constructor, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        return _rebuild, (found, constructor, arguments[1:]), *state

    def _get_name(self) -> str:  # in print(model)
        return f"{super()._get_name()}[mmkernels]"


def _rebuild(found: Swap, constructor: Callable, arguments: tuple) -> nn.Module:
    module = constructor(found.plain, *arguments)
    module.__class__ = _swapped_class(*found)
    return module


@cache
def _swapped_class(plain: type, parts: tuple[Part, ...], kinds: tuple[tuple[str, str | None], ...]) -> type:
    made = plain
    for part in parts:
        made = subclass(made, part) if isinstance(part, type) else part(made)
    return subclass(made, _Swapped, {_ATTRIBUTE: Swap(plain, parts, kinds)})


def subclass(base: type, mixin: type | None = None, members: dict[str, object] | None = None) -> type:
    """A subclass that is called as its base is."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    bases = (base,) if mixin is None else (mixin, base)
    return types.new_class(base.__name__, bases, exec_body=lambda body: body.update(names | (members or {})))
