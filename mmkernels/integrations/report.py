"""What accelerate did to a model, and what its calls did since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import backends
from .swap import plain_class


@dataclass(frozen=True)
class Entry:
    """One module: where it is in the model, its class, and what was done, or why not. kind: of hot path, "patch
    embedding", "attention" or "loss"; "" for what is none (a library that is not served, a call that fell back)."""

    path: str
    cls: str
    what: str
    kind: str = ""


@dataclass
class Report:
    """`swapped`: what runs on mmkernels now. `left`: what looks like a hot path and was left as it is, and why.
    `fallbacks`: calls that a swapped module handed to the model's own code since, which `accelerate` counts when it is
    called again; `what` says why and how often. Printing it gives a line for each kind."""

    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    fallbacks: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [*_lines("swapped", self.swapped), *_lines("left", self.left), *_lines("fell back", self.fallbacks)]
        )


def _lines(title: str, entries: Iterable[Entry]) -> Iterator[str]:
    counts = Counter((entry.cls, entry.what) for entry in entries)
    first = {}
    for entry in entries:
        first.setdefault((entry.cls, entry.what), entry.path or "the model itself")
    for (cls, what), count in counts.items():
        place = first[cls, what] if count == 1 else f"{first[cls, what]} and {count - 1} more"
        yield f"{title}: {count} x {cls}: {what} ({place})"


# ---- what modules keep of it

_FALLBACKS = "_mmkernels_fallbacks"


def set_backend(module: nn.Module, backend: str | None) -> None:
    if backend is not None:
        module.__dict__[backends.MODULE_ATTRIBUTE] = backend


def forget(module: nn.Module) -> None:
    for name in (backends.MODULE_ATTRIBUTE, _FALLBACKS):
        module.__dict__.pop(name, None)


def count_fallback(module: nn.Module, reason: str) -> None:
    if not torch.compiler.is_compiling():  # a count that compiled code reads would compile it again at every call
        counts = module.__dict__.setdefault(_FALLBACKS, Counter())
        counts[reason] += 1


def fallbacks(model: nn.Module) -> list[Entry]:
    return [
        Entry(path, plain_class(module).__name__, f"{reason} ({count} calls)")
        for path, module in model.named_modules()
        for reason, count in module.__dict__.get(_FALLBACKS, {}).items()
    ]
