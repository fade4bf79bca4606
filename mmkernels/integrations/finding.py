"""What a finder says of one module. Each library has one, in a module of its name:

fits() -> str | None                    why the installed version is not served, if it is not
find(module, path, parent)              -> list[Finding], empty for what is nothing of this library's
swapped(model), restored(model)         called when that was done, for what a library keeps elsewhere in a model
"""

from __future__ import annotations

from typing import NamedTuple

from .swap import Part


class Finding(NamedTuple):
    """kind: of hot path; None: the module only prepares masks for those inside it that attend. parts: what makes its
    new class (swap.py); none: it is left, for the reason `left`. what: how a report names it."""

    kind: str | None
    parts: tuple[Part, ...] = ()
    left: str | None = None
    what: str | None = None
