"""The libraries that are swept. Each has a module with

HAS_NAMES                    whether models take the name of an attention
cases(families) -> list      of Case; of all families where none is named
subject(case) -> Subject     a model that runs, with inputs; raises CannotBeBuilt or PlainFails
version() -> str
"""

from __future__ import annotations

from types import ModuleType

from .cases import WAYS

NAMES = ("transformers", "timm", "open_clip")


def named(name: str) -> ModuleType:
    if name == "transformers":
        from . import transformers_models as module
    elif name == "timm":
        from . import timm_models as module
    elif name == "open_clip":
        from . import open_clip_models as module
    else:
        raise ValueError(f"no library {name!r}; there are {', '.join(NAMES)}")
    return module


def ways(name: str) -> tuple[str, ...]:
    return WAYS if named(name).HAS_NAMES else WAYS[:1]
