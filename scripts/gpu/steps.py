"""The steps by their names, in the order in which they matter; and check-OP, all of `mmkernels check` for an op."""

from __future__ import annotations

from types import ModuleType

from . import attention, bench, check, info, losses, racecheck, wgmma
from .pool import Row

STEPS: dict[str, ModuleType] = {
    "info": info,
    "check": check,
    "racecheck": racecheck,
    "wgmma": wgmma,
    "losses": losses,
    "attention": attention,
    "bench": bench,
}


def module_of(step: str) -> ModuleType:
    return STEPS[step.partition("-")[0]]


def rows_of(step: str, device: str) -> list[Row]:
    _, _, op = step.partition("-")
    return check.rows_of_op(op, device) if op else STEPS[step].rows(device)
