"""A model's own code, in which a few names mean something else.

transformers' models reach attention by two sorts of names in their modeling files: `ALL_ATTENTION_FUNCTIONS`, which
gives them an attention function by the name in their config, and the functions of `masking_utils` that make masks. A
swapped module runs the very functions that its authors wrote, compiled from the same lines, with a twin of the file's
globals in which these names mean ours. So nothing is set that others see: configs keep the name they had, other models
of the class keep their code, and whatever the model decides by that name it decides as before.
"""

from __future__ import annotations

import sys
import types
from functools import cache

from transformers import AttentionInterface, masking_utils
from transformers.utils.generic import is_flash_attention_requested

from .._tracing import is_traced
from ..code_words import authored, methods, reaches, words
from ..swap import subclass
from . import tiles
from .attention import Interface
from .layer_source import is_interface, is_of_a_model
from .masks import with_spans

_MASKS = [
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
    "create_bidirectional_mask",
    "create_bidirectional_sliding_window_mask",
    "create_masks_for_generate",
]
_WITH_SPANS = {
    getattr(masking_utils, name): with_spans(getattr(masking_utils, name))
    for name in _MASKS
    if hasattr(masking_utils, name)
}
_PACKED = "cu_seq_lens_q"  # code that has this word can hand all its segments to one call


def exchanged(plain: type) -> type:
    """A subclass whose methods attend, and make masks, by mmkernels."""
    return subclass(plain, None, {name: _exchanged_method(method) for name, method in _reaching(plain)})


def prepares(cls: type) -> bool:
    """Whether it makes masks, or segments, for attention inside it."""
    return bool(_reaching(cls))


@cache
def _reaching(cls: type) -> list[tuple[str, object]]:
    """The methods of a class, inherited ones too, whose code reaches a name that is exchanged."""
    return [(name, method) for name, method in methods(cls).items() if _is_reaching(authored(method))]


def _is_reaching(function: types.FunctionType | None) -> bool:
    if not is_of_a_model(function):
        return False
    return reaches(function, lambda _, value: _is_exchanged(value)) or _is_packed(function)


def _is_exchanged(value: object) -> bool:
    if isinstance(value, types.FunctionType):
        return value in _WITH_SPANS or _is_of_tiles(value)
    return is_interface("", value)


def _is_of_tiles(function: types.FunctionType) -> bool:
    return f"{function.__module__}.{function.__qualname__}" == tiles.NAME


def _is_packed(function: types.FunctionType) -> bool:
    return _PACKED in words(function.__code__) and reaches(function, lambda _, x: x is is_flash_attention_requested)


# ---- twins


def _exchanged_method(method: object) -> object:
    if isinstance(method, staticmethod | classmethod):
        return type(method)(_exchanged(method.__func__))
    return _exchanged(method)


def _exchanged(function: types.FunctionType) -> types.FunctionType:
    """The function over the twin of its globals, within the decorators it had."""
    closure, globals_ = function.__closure__, function.__globals__
    inner = vars(function).get("__wrapped__")
    if inner is None:
        globals_ = _twin(function)
    else:
        exchanged_inner = _exchanged(inner)
        cells = [types.CellType(exchanged_inner) if _holds(cell, inner) else cell for cell in closure]
        closure = tuple(cells)
    # A code object of its own: torch.compile keeps what it compiled by it.
    twin = types.FunctionType(function.__code__.replace(), globals_, function.__name__, function.__defaults__, closure)
    twin.__kwdefaults__ = function.__kwdefaults__
    vars(twin).update(vars(function))
    if inner is not None:
        twin.__wrapped__ = exchanged_inner
    return twin


def _holds(cell: types.CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


_twins: dict[tuple[int, bool], tuple[dict, types.ModuleType]] = {}  # with the globals, so that their id stays theirs


def _twin(function: types.FunctionType) -> dict[str, object]:
    """The globals of a function, exchanged. They are those of a module, where torch.compile looks them up."""
    theirs, packed = function.__globals__, _is_packed(function)
    key = id(theirs), packed
    if key not in _twins:
        module = types.ModuleType(f"mmkernels.exchanged{'.packed' * packed}.{theirs['__name__']}.{id(theirs):x}")
        _twins[key] = theirs, module
        sys.modules[module.__name__] = module
        own = vars(module)
        own.update({name: value for name, value in theirs.items() if name not in own})
        own["__builtins__"] = theirs["__builtins__"]
        for name, value in theirs.items():
            if name not in ("__name__", "__builtins__"):
                own[name] = _stand_in(value, theirs, packed)
    return vars(_twins[key][1])


def _stand_in(value: object, theirs: dict[str, object], packed: bool) -> object:
    if isinstance(value, AttentionInterface):
        return Interface(value)
    if _is_exchanged(value):
        return _WITH_SPANS[value] if value in _WITH_SPANS else tiles.with_spans(value)
    if value is is_flash_attention_requested:
        return _packs if packed else _no
    written = authored(value) if isinstance(value, types.FunctionType) else None  # torch.compile leaves others there
    if written is not None and written.__globals__ is theirs and _is_reaching(written):
        return _exchanged(value)
    return value


def _packs(*args, **kwargs) -> bool:
    """Segments are for attention that reads them, which that of the model does not where it is asked to be plain."""
    return not is_traced() or is_flash_attention_requested(*args, **kwargs)


def _no(*args, **kwargs) -> bool:
    return False
