"""accelerate(model): find the hot paths of a model, swap them, say so; restore(model): put everything back.

Nothing is changed but the classes of single modules of one model, for subclasses with the same parameters (swap.py).
What is a hot path, each library's finder says (finding.py).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Iterator
from types import ModuleType

from torch import nn

from .. import backends
from .._warnings import warn
from . import report as reports
from . import torch_modules, unknown
from .report import Entry, Report
from .swap import is_wrapped, plain_class, served_kinds, swap, swap_of, undo

KINDS = ("patch embedding", "attention", "loss")
_LIBRARIES = ("transformers", "timm", "open_clip")  # that have a finder of their own


def accelerate(
    model: nn.Module, *, backend: str | None = None, only: Collection[str] | None = None, verbose: bool = True
) -> Report:
    """Swap the hot paths inside `model` for mmkernels', in place: same parameters, same state_dict, same hooks.

    Knows the models of transformers (through its attention interface), timm and open_clip, the losses of both that
    train on pairs (open_clip's is a module of its own: accelerate that), and torch's own modules: convolutions that
    embed patches, attention. What spans cannot express, such as dropout on
    attention weights, still runs, by the model's own code; the report of a second call counts such calls. Only this
    model is changed: not its config, nor any other model.

    Args:
        model: a loaded model, or a part of one, on any device, in training or not. Called again, it swaps what is new.
        backend: serve all that is swapped by this one ("cuda", "triton", "cpu", "reference", and
            "flash-attn" for attention alone); None: the fastest, or what an earlier call asked for.
        only: which of "patch embedding", "attention", "loss" to swap; None: all.
        verbose: print the report.

    Returns:
        What is swapped, what was left and why.

    Raises:
        ValueError: the model has no hot path that mmkernels knows (the message says what was seen), or an argument is
            none of those accepted. Where it has some and all are left, that is in the report, and a warning.
    """
    backends.requested(backend)
    kinds = _kinds(only)
    left = _swap_all(model, kinds)
    swapped = [(path, module) for path, module in model.named_modules() if served_kinds(module)]
    if not swapped:
        _say_nothing_swapped(model, kinds, left, verbose)
    for _, module in swapped:
        reports.set_backend(module, backend)
    report = Report([entry for found in swapped for entry in _entries(*found)], left, reports.fallbacks(model))
    if verbose:
        print(report)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate(model)`: the model computes, saves and compiles as before, bit for bit. Returns the model.

    Raises:
        ValueError: nothing in the model is accelerated, or the class of a module has been changed since, as by FSDP.
    """
    for path, module in model.named_modules():
        if is_wrapped(module):
            raise ValueError(
                f"restore: {path or 'the model'} has become a {type(module).__name__} since it was accelerated; undo "
                "that first, or restore before wrapping the model"
            )
    swapped = [module for module in model.modules() if swap_of(module)]
    if not swapped:
        raise ValueError(f"restore: this {type(model).__name__} was not accelerated")
    for module in swapped:
        undo(module)
        reports.forget(module)
    for finder in _finders(model)[0]:
        finder.restored(model)
    return model


def _say_nothing_swapped(model: nn.Module, kinds: Collection[str], left: list[Entry], verbose: bool) -> None:
    """An error where nothing was found, and a warning where what was found is better left."""
    seen = "; ".join(sorted({f"{entry.cls}: {entry.what}" for entry in left}))
    message = f"accelerate: nothing to swap in {type(model).__name__}: "
    if not any(entry.kind in ("attention", "loss") for entry in left):
        raise ValueError(message + (seen or f"it has no {', no '.join(kinds)} that mmkernels knows"))
    if not verbose:  # else the report is printed, and says it
        warn(message + seen)


def _kinds(only: Collection[str] | None) -> tuple[str, ...]:
    wanted = (only,) if isinstance(only, str) else KINDS if only is None else tuple(only)
    for kind in wanted:
        if kind not in KINDS:
            raise ValueError(f"accelerate: only has {kind!r}; accepted are {', '.join(map(repr, KINDS))}")
    return wanted


def _entries(path: str, module: nn.Module) -> Iterator[Entry]:
    for kind, what in served_kinds(module):
        yield Entry(path, plain_class(module).__name__, what or kind, kind)


# ---- finding


def _swap_all(model: nn.Module, kinds: Collection[str]) -> list[Entry]:
    """Swaps what is found; returns what is left."""
    finders, left = _finders(model)
    modules = dict(model.named_modules())
    preparing = []
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0]) if path else None
        for found in (found for finder in finders for found in finder.find(module, path, parent)):
            if found.kind is None:
                preparing.append((module, found))
            elif found.kind in kinds and (found.kind, found.what) not in served_kinds(module):
                reason = found.left or _why_not(module, found.kind)
                if reason is None:
                    swap(module, found.parts, ((found.kind, found.what),))
                else:
                    left.append(Entry(path, plain_class(module).__name__, reason, found.kind))
    for module, found in preparing:  # masks of spans, for those who read them
        if _serves("attention", module) and _why_not(module, "") is None:
            swap(module, found.parts, ())
    for finder in finders:
        finder.swapped(model)
    return left + (list(_unknown(modules, left)) if "attention" in kinds else [])


def _why_not(module: nn.Module, kind: str) -> str | None:
    if "forward" in vars(module):
        return f"{kind}: the instance has a forward of its own"
    return f"{kind}: its class has been changed since it was swapped" if is_wrapped(module) else None


def _unknown(modules: dict[str, nn.Module], left: list[Entry]) -> Iterator[Entry]:
    """Attention that nobody found."""
    named = {entry.path for entry in left}
    for path, module in modules.items():
        reason = unknown.why_left(module)
        if reason and path not in named and not is_wrapped(module) and not _serves("attention", module):
            yield Entry(path, plain_class(module).__name__, reason, "attention")


def _serves(kind: str, module: nn.Module) -> bool:
    """Whether it, or a module inside it, was swapped for this kind."""
    return any(kind == served for inner in module.modules() for served, _ in served_kinds(inner))


def _finders(model: nn.Module) -> tuple[list[ModuleType], list[Entry]]:
    """Of the libraries that the process has imported; and an entry for each that is not served as it is installed."""
    found, left = [torch_modules], []
    for library in _LIBRARIES:
        if library not in sys.modules:
            continue
        try:
            finder = importlib.import_module(f"mmkernels.integrations.{library}")
            reason = finder.fits()
        except (ImportError, AttributeError) as error:
            reason = f"{library} {getattr(sys.modules[library], '__version__', '')} is not served: {error}"
        if reason is None:
            found.insert(0, finder)
        elif any(type(module).__module__.startswith(f"{library}.") for module in model.modules()):
            left.append(Entry("", library, reason))
    return found, left
