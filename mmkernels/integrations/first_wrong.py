"""Where an accelerated model goes wrong: the first module whose result its inputs do not excuse.

Going forward, the first output beyond its budget is the culprit's, since all that came before is right. Where all
outputs are right, some gradient is not: then the culprit is a swapped module whose parameters have a wrong gradient
although the gradient it was handed is right.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from .agreement import Quantity, outputs_measured
from .values import Named
from .watch import Call, Watch, parts


@dataclass(frozen=True)
class FirstWrong:
    path: str
    why: str


def first_wrong(
    exact: Watch,
    plain: Watch,
    ours: Watch,
    swapped: Collection[str],
    wrong_gradients: Collection[str],
    computed_in: torch.dtype,
) -> FirstWrong | None:
    """Of wide watches. wrong_gradients: names of parameters. None: it cannot be told."""
    if ours.inside:
        return FirstWrong(ours.inside[-1], "the exception came from there")
    so_far = set()
    for call in plain.returned:
        so_far |= {call[0]} & set(swapped)
        returned = [_that_matter(call, x.returned, exact) for x in (exact, plain, ours)]
        wrong = _wrong(returned, len(so_far) or 1, computed_in)
        if wrong is not None:
            return FirstWrong(call[0], f"its {wrong}")
    for call in reversed(plain.returned):
        path = call[0]
        own = next((name for name in wrong_gradients if name.startswith(f"{path}." if path else "")), None)
        if path in swapped and own is not None and not _is_around(path, swapped):
            handed = [x.gradients.get(call, {}) for x in (exact, plain, ours)]
            if _wrong(handed, len(swapped), computed_in) is None:
                return FirstWrong(path, f"the gradient it is handed is right, that of {own} is not")
    outer = next((path for path in swapped if _is_around(path, swapped)), None)
    return FirstWrong(outer, "gradients are wrong from there on") if wrong_gradients and outer is not None else None


def _is_around(path: str, swapped: Collection[str]) -> bool:
    """As the model itself, which is swapped for its loss: wrong gradients inside it may be those of another module."""
    return any(path in parts(other)[:-1] for other in swapped)


def _that_matter(call: Call, found: dict[Call, Named], exact: Watch) -> Named:
    """Rows that have a gradient, where that is known."""
    rows = exact.rows.get(call, {})
    fits = {name: name in rows and x.shape[: rows[name].dim()] == rows[name].shape for name, x in found[call].items()}
    return {name: x[rows[name]] if fits[name] else x for name, x in found[call].items()} if call in found else {}


def _wrong(given: list[Named], swapped: int, computed_in: torch.dtype) -> Quantity | None:
    """Of what all three have: attention weights, say, are there only if somebody computes them."""
    common = [name for name in given[1] if all(name in x for x in given)]
    each = ({name: x[name] for name in common} for x in given)
    return next((x for x in outputs_measured(*each, math.sqrt(swapped), computed_in) if not x.ok), None)
