"""accelerate(model): find the hot paths of a model, swap them, say so; restore(model): put everything back.

Nothing global changes. On one model: the classes of single modules, for subclasses with the same parameters, and the
attention implementation of transformers' configs. What was done is kept on the model as plain data, by path, so that a
copy of it, or one that was pickled, can be restored on its own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from .. import backends
from . import report as reports
from . import torch_modules
from .report import Entry, Report

KINDS = ("patch embedding", "attention", "loss")
_RECORD = "_mmkernels_record"


def accelerate(
    model: nn.Module, *, backend: str | None = None, only: Collection[str] | None = None, verbose: bool = True
) -> Report:
    """Swap the hot paths inside `model` for mmkernels', in place: same parameters, same state_dict, same hooks.

    Knows the models of transformers (through its attention interface), timm and open_clip, and torch's own modules:
    convolutions that embed patches, attention, contrastive losses. What spans cannot express, such as dropout on
    attention weights, still runs, by the model's own code; the report of a second call counts such calls.

    Args:
        model: a loaded model, on any device, in training or not. Called again, it changes nothing more.
        backend: serve all that is swapped by this one ("cuda", "triton", "cpu", "reference", and
            "flash-attn" for attention alone); None: the fastest.
        only: which of "patch embedding", "attention", "loss" to swap; None: all.
        verbose: print the report.

    Returns:
        What was swapped, what was left and why.

    Raises:
        ValueError: nothing in the model could be swapped (the message says what was seen), or an argument is none of
            those accepted.
    """
    backends.requested(backend)
    kinds = _kinds(only)
    record = model.__dict__.get(_RECORD) or _Record()
    found = _Findings(model, kinds)
    if not found.classes and not found.configs and not record.report.swapped:
        seen = "; ".join(sorted({f"{entry.cls}: {entry.what}" for entry in found.left}))
        raise ValueError(
            f"accelerate: nothing to swap in {type(model).__name__}: "
            + (seen or f"it has no {', no '.join(kinds)} that mmkernels knows")
        )
    record.swap(model, found, backend)
    model.__dict__[_RECORD] = record
    report = Report(record.report.swapped, record.report.left, reports.fallbacks(model))
    if verbose:
        print(report)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate(model)`: the model computes, saves and compiles as before, bit for bit. Returns the model.

    Raises:
        ValueError: the model was not accelerated, or the class of a module has been changed since, as by FSDP.
    """
    record = model.__dict__.get(_RECORD)
    if record is None:
        raise ValueError(f"restore: this {type(model).__name__} was not accelerated")
    record.undo(model)
    del model.__dict__[_RECORD]
    return model


def _kinds(only: Collection[str] | None) -> tuple[str, ...]:
    wanted = (only,) if isinstance(only, str) else KINDS if only is None else tuple(only)
    for kind in wanted:
        if kind not in KINDS:
            raise ValueError(f"accelerate: only has {kind!r}; accepted are {', '.join(map(repr, KINDS))}")
    return wanted


@dataclass
class _Record:
    """What was done to a model."""

    classes: dict[str, type] = field(default_factory=dict)  # of a module before
    configs: dict[str, str] = field(default_factory=dict)  # attention implementation of a module's config before
    sites: list[str] = field(default_factory=list)  # modules that go by their config
    report: Report = field(default_factory=Report)

    def swap(self, model: nn.Module, found: _Findings, backend: str | None) -> None:
        for path, new in found.classes.items():
            module = model.get_submodule(path)
            self.classes[path] = type(module)
            module.__class__ = new
        for path, name in found.configs.items():
            config = model.get_submodule(path).config
            self.configs[path] = config._attn_implementation_internal
            config._attn_implementation_internal = name
        self.sites += found.sites
        for path in {*found.classes, *found.sites}:
            reports.set_backend(model.get_submodule(path), backend)
        self.report = Report(self.report.swapped + found.swapped, found.left)

    def undo(self, model: nn.Module) -> None:
        for path in self.classes:
            now = type(model.get_submodule(path))
            if not now.__module__.startswith("mmkernels."):
                raise ValueError(
                    f"restore: {path or 'the model'} has become a {now.__name__} since it was accelerated; undo that "
                    "first, or restore before wrapping the model"
                )
        for path, name in self.configs.items():
            model.get_submodule(path).config._attn_implementation_internal = name
        for path, cls in self.classes.items():
            model.get_submodule(path).__class__ = cls
        for path in {*self.classes, *self.sites}:
            reports.forget(model.get_submodule(path))

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.configs:  # a process that only unpickles the model needs the names of its attention
            from . import transformers  # noqa: F401


class _Findings:
    """What a model holds that can be swapped, or looks as if it could."""

    def __init__(self, model: nn.Module, kinds: Collection[str]):
        self.kinds = kinds
        self.classes: dict[str, type] = {}  # path -> new class
        self.configs: dict[str, str] = {}  # path of a module -> new attention implementation of its config
        self.sites: list[str] = []  # modules whose attention goes by a config
        self.swapped: list[Entry] = []
        self.left: list[Entry] = []
        parents = {id(child): type(module) for module in model.modules() for child in module.children()}
        for path, module in model.named_modules():
            self._look_at(path, module, parents.get(id(module)))
        if "attention" in kinds and "transformers" in sys.modules:
            self._look_at_configs(model)

    def _look_at(self, path: str, module: nn.Module, parent: type | None) -> None:
        new, kind, left = _swap_of(module, path, parent)
        if kind not in self.kinds:
            return
        if left is not None:
            self.left.append(Entry(path, type(module).__name__, left))
        elif new is not None and "forward" in module.__dict__:
            self.left.append(Entry(path, type(module).__name__, f"{kind}: the instance has a forward of its own"))
        elif new is not None:
            self.classes[path] = new
            self.swapped.append(Entry(path, type(module).__name__, kind))

    def _look_at_configs(self, model: nn.Module) -> None:
        """A config is shared by the modules of a model or tower: it is set once, on all that reach attention."""
        from transformers import PreTrainedModel

        modules = dict(model.named_modules())
        sites = [p for p, m in modules.items() if hasattr(m, "config") and _source_has(type(m), "get_interface")]
        if not sites:
            return
        from .transformers import NAME, PACKED_NAME

        owners: dict[int, tuple[str, object]] = {}
        packed = set()
        for path, module in modules.items():
            above = not path or any(site.startswith(path + ".") for site in sites)
            if path in sites or (isinstance(module, PreTrainedModel) and above):
                owners.setdefault(id(module.config), (path, module.config))
                if _source_has(type(module), "is_flash_attention_requested"):
                    packed.add(id(module.config))
        ours = (NAME, PACKED_NAME)
        for path in sites:
            module = modules[path]
            if module.config._attn_implementation not in ours:
                self.sites.append(path)
                if path not in self.classes:  # else it is in the report already
                    self.swapped.append(Entry(path, type(module).__name__, "attention"))
        for key, (path, config) in owners.items():
            if config._attn_implementation not in ours:
                self.configs[path] = PACKED_NAME if key in packed else NAME


# ---- single modules

# Pooling heads that take the weights of torch's attention and drop them.
_DROP_WEIGHTS = {"SiglipMultiheadAttentionPoolingHead", "Siglip2MultiheadAttentionPoolingHead", "AriaCrossAttention"}


def _swap_of(module: nn.Module, path: str, parent: type | None) -> tuple[type | None, str | None, str | None]:
    """The class to swap a module's for, the kind of hot path, and, where it is to be left, why."""
    cls, name = type(module), path.rsplit(".", 1)[-1]
    if cls in _swaps():
        return *_swaps()[cls], None
    if cls in torch_modules.PATCH_CONVOLUTIONS:
        reason = torch_modules.why_no_patches(module)
        if reason is None:
            return torch_modules.PATCH_CONVOLUTIONS[cls], "patch embedding", None
        return None, "patch embedding", f"a convolution, and {reason}" if "patch" in name else None
    if cls is nn.Linear and "patch_embed" in name:
        return None, "patch embedding", "a matrix product already"
    if cls is nn.MultiheadAttention:
        drops = parent is not None and parent.__name__ in _DROP_WEIGHTS
        new = "SpanMultiheadAttentionWithoutWeights" if drops else "SpanMultiheadAttention"
        return getattr(torch_modules, new), "attention", None
    if _is_unknown_attention(module):
        return None, "attention", "written out in the model, and not known to mmkernels"
    return None, None, None


def _swaps() -> dict[type, tuple[type, str]]:
    """Exact class -> what to swap it for, and its kind; of the libraries that the process has imported."""
    found: dict[type, tuple[type, str]] = {}
    for library in _libraries():
        found |= library
    return found


def _libraries() -> Iterator[dict]:
    if "transformers" in sys.modules:
        from .transformers import losses, modules

        yield losses.SWAPS
        yield modules.SWAPS
    if "timm" in sys.modules:
        from . import timm

        yield timm.SWAPS


def _is_unknown_attention(module: nn.Module) -> bool:
    """Whether it computes attention itself, in code of its authors, with nothing inside that mmkernels serves."""
    cls = type(module)
    if cls.__module__.startswith(("mmkernels.", "torch.")) or _source_has(cls, "get_interface"):
        return False
    if "Attention" not in cls.__name__ and "AttnBlock" not in cls.__name__:
        return False
    if any(_is_served(type(inner)) for inner in module.modules() if inner is not module):
        return False
    return _source_has(cls, "softmax", "einsum", "bmm", "scaled_dot_product_attention")


def _is_served(cls: type) -> bool:
    known = cls in _swaps() or issubclass(cls, nn.MultiheadAttention) or cls.__module__.startswith("mmkernels.")
    return known or _source_has(cls, "get_interface")


@cache
def _source_has(cls: type, *words: str) -> bool:
    """Whether the forward that the model's authors wrote holds one of the words."""
    theirs = next((c for c in cls.__mro__ if not c.__module__.startswith("mmkernels.")), object)
    try:
        source = inspect.getsource(inspect.unwrap(theirs.forward))
    except (AttributeError, TypeError, OSError):
        return False
    return any(word in source for word in words)
