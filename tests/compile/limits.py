"""How much the loops of a kernel may cost: one row of a table for every kernel that multiplies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from loops import TILES, Way


class Limit(NamedTuple):
    bound: float  # the busiest pipe's cycles over the tensor cores'
    issue: float  # instructions issued, over the same


WITHOUT_A_REASON = 1.2  # a bound may be


@dataclass(frozen=True)
class Row:
    """Limits are a few per cent above what was measured. Lower them when a kernel gets better."""

    kernels: str  # pattern of fnmatch
    plain: tuple[float, float]
    masked: tuple[float, float] | None = None
    outer: Sequence[tuple[float, float]] = ()  # by what the tensor cores have to do; the last also for more than that
    second: tuple[float, float] | None = None  # of a kernel with two inner loops
    why: str = ""
    serialised: bool = False

    def __post_init__(self) -> None:
        if not self.why and (self.serialised or any(limit.bound > WITHOUT_A_REASON for limit in self.limits.values())):
            raise ValueError(f"say why {self.kernels} is so far from what the tensor cores can do")

    @property
    def limits(self) -> dict[str, Limit]:
        found = {"plain": self.plain, "masked": self.masked, "plain 2": self.second}
        if self.outer:
            found |= {f"outer {tile}": self.outer[min(i, len(self.outer) - 1)] for i, tile in enumerate(TILES)}
        return {name: Limit(*limit) for name, limit in found.items() if limit is not None}


def complaints(kernel: str, ways: Sequence[Way], rows: Iterable[Row]) -> list[str]:
    """What is wrong with a kernel's loops, each with its figures."""
    fitting = [row for row in rows if fnmatchcase(kernel, row.kernels)]
    if len(fitting) != 1:
        return [f"{len(fitting)} rows of limits fit {kernel}, which has\n  " + "\n  ".join(map(described, ways))]
    limits, found = fitting[0].limits, {way.name for way in ways}
    said = [f"{kernel} has no loop {name!r} any more" for name in limits if name not in found]
    for way in ways:
        wrong = wrong_with(way, limits.get(way.name), fitting[0].serialised)
        said += [f"{kernel}: {', '.join(wrong)}\n  {described(way)}"] if wrong else []
    return said


def wrong_with(way: Way, limit: Limit | None, may_be_serialised: bool) -> list[str]:
    wrong = ["spills"] * way.spills + ["waits for every product"] * (way.events.serialised and not may_be_serialised)
    if limit is None:
        return [*wrong, f"no limit for the loop {way.name!r}"]
    if way.bound > limit.bound:
        wrong.append(f"bound {way.bound:.3f}, by {way.busiest}, is above {limit.bound:.2f}")
    if way.issue > limit.issue:
        wrong.append(f"{way.issue:.3f} instructions a tensor cycle are above {limit.issue:.2f}")
    return wrong


def described(way: Way) -> str:
    cycles = ", ".join(f"{pipe} {number:.0f}" for pipe, number in way.cycles.items())
    return f"{way.name} at {way.address}: bound {way.bound:.3f}, issue {way.issue:.3f}; {cycles}; {way.events.order}"


def rows_without_kernel(rows: Iterable[Row], kernels: Iterable[str]) -> list[str]:
    names = set(kernels)
    return [f"no kernel is {row.kernels}" for row in rows if not any(fnmatchcase(name, row.kernels) for name in names)]
