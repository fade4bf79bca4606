"""What a series tells: how time and memory grow with its size, and where a size falls behind its neighbours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SERIES = ("op", "series", "dtype", "pass")
FITTED = 3  # sizes at least, the largest, over which an exponent is fitted
BEHIND = 0.9  # of what the neighbours let expect


@dataclass(frozen=True)
class Growth:
    """One implementation along a series; exponents are of the larger half of its sizes, None where fewer than three
    were measured or nothing was held."""

    impl: str
    is_ours: bool
    time: float | None
    memory: float | None


def by_series(results: Iterable[dict]) -> Iterator[tuple[tuple, list[dict]]]:
    """The results of each series, dtype and pass, sizes rising."""
    placed = sorted((x for x in results if "series" in x), key=lambda x: x["size"])
    order = {tuple(x[key] for key in SERIES): None for x in results if "series" in x}
    for name in order:
        yield name, [x for x in placed if tuple(x[key] for key in SERIES) == name]


def growth(results: list[dict]) -> list[Growth]:
    """Of each implementation of one series; ours first."""
    names = sorted({(not x["is_ours"], x["impl"]) for x in results})
    found = []
    for is_other, name in names:
        own = [x for x in results if x["impl"] == name]
        time, memory = (_exponent([(x["size"], x[figure]) for x in own]) for figure in ("ms", "peak_bytes"))
        found.append(Growth(name, not is_other, time, memory))
    return found


def _exponent(points: list[tuple[int, float | None]]) -> float | None:
    """p of c * size ** p, by least squares of logarithms. What a call costs on nothing bends the small sizes."""
    known = [(size, value) for size, value in points if value]
    if len(known) < FITTED:
        return None
    middle = math.sqrt(known[0][0] * known[-1][0])
    large = [x for x in known if x[0] >= middle]
    used = large if len(large) >= FITTED else known[-FITTED:]
    sizes, values = ([math.log(x) for x in xs] for xs in zip(*used, strict=True))
    return statistics.linear_regression(sizes, values).slope


def behind(results: list[dict]) -> list[tuple[int, float]]:
    """Sizes at which ours reaches less than `BEHIND` of the peak fraction between those of its neighbours, and what of
    it they reach."""
    ours = [(x["size"], x["peak_fraction"]) for x in results if x["is_ours"]]
    found = []
    for (before, low), (size, fraction), (after, high) in zip(ours, ours[1:], ours[2:], strict=False):
        weight = math.log(size / before) / math.log(after / before)
        reached = fraction / (low ** (1 - weight) * high**weight)
        if reached < BEHIND:
            found.append((size, reached))
    return found
