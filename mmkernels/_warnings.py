"""Warnings that point at the line of the user's own code."""

from __future__ import annotations

import sys
import warnings

_INSIDE = ("mmkernels", "torch")  # torch calls our ops and modules for the user


def warn(message: str) -> None:
    """Warn of the innermost line outside of this package and of torch; a count of frames to leave would differ with the
    way a call took: a function, a module, autograd."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame = frame.f_back
    there = frame.f_globals
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        there.get("__name__"),
        there.setdefault("__warningregistry__", {}),
    )
