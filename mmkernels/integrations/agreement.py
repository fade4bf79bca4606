"""Whether an accelerated model computes what the plain one does: what is compared, and how wrong it may be.

    truth   the plain model in float64, on the very same weights and inputs
    passes  ||ours - truth||  <=  2 ||plain - truth||  +  2 ulp for each module that was swapped

in the norm over all elements of an output or gradient: what an op's own budget allows, added over the layers. A maximum
over the elements would be a lottery after so many of them. What is no floating number (ids) has to be equal; where the
plain model itself flips some of them in its dtype, twice as many may be flipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .values import Named, Values


@dataclass(frozen=True)
class Quantity:
    """One output or gradient: how wrong it is, in the norm over its elements, and may be."""

    name: str
    error: float
    plain_error: float
    rounding: float  # 2 ulp for each module swapped
    size: float  # of what rounds: errors are quoted relative to it
    norm: float  # of the truth
    complaint: str | None = None  # what no error budget excuses: a wrong shape, a NaN
    counts: bool = False  # of no floating numbers: the errors count elements that differ

    @property
    def budget(self) -> float:
        return 2 * self.plain_error + self.rounding

    @property
    def ok(self) -> bool:
        return self.complaint is None and self.error <= self.budget

    @property
    def ratio(self) -> float:
        """The error in units of the budget; at most 1 passes."""
        if self.complaint is not None or math.isnan(self.error / (self.budget or 1.0)):
            return math.inf
        return self.error / self.budget if self.budget else math.inf if self.error else 0.0

    def __str__(self) -> str:
        if self.complaint is not None:
            return f"{self.name} {self.complaint}"
        if self.counts:
            return f"{self.name} differs in {self.error:.0f} of {self.size} elements, plain in {self.plain_error:.0f}"
        return f"{self.name} is off by {self.error:.2e}, plain by {self.plain_error:.2e}, of {self.norm:.2e}"


def outputs_measured(
    truth: Named, plain: Named, ours: Named, swapped: float, computed_in: torch.dtype | None = None
) -> list[Quantity]:
    """computed_in: the dtype whose ulps count, where that is not the values': of autocast, or of a model in bfloat16
    that returns its loss in float32."""
    return [
        _quantity(name, truth, plain, ours, _norm(truth.get(name)), swapped, computed_in) for name in _all(plain, ours)
    ]


def gradients_measured(
    truth: Values, plain: Values, ours: Values, swapped: float, computed_in: torch.dtype | None = None
) -> list[Quantity]:
    """Gradients cancel: that of a key projection's bias is zero but for rounding. What rounds is as large as the
    gradients that flow beside it. That of a temperature, one number, is a sum over the terms of the loss."""
    largest = max(map(_norm, truth.gradients.values()), default=0.0)
    scalar = max([largest, *(_norm(x) for x in truth.outputs.values() if x.dim() == 0 and x.is_floating_point())])
    each = truth.gradients, plain.gradients, ours.gradients
    names = _all(plain.gradients, ours.gradients)
    sizes = (scalar if name in truth.gradients and truth.gradients[name].numel() == 1 else largest for name in names)
    return [_quantity(name, *each, size, swapped, computed_in) for name, size in zip(names, sizes, strict=True)]


def measured(
    truth: Values, plain: Values, ours: Values, swapped: float, computed_in: torch.dtype | None = None
) -> tuple[list[Quantity], list[Quantity]]:
    """The outputs, and the gradients."""
    outputs = outputs_measured(truth.outputs, plain.outputs, ours.outputs, swapped, computed_in)
    return outputs, gradients_measured(truth, plain, ours, swapped, computed_in)


def modules_measured(truth: Values, plain: Values, ours: Values, computed_in: torch.dtype) -> list[Quantity]:
    """What swapped modules return, each beside the roundings of those before it. A mistake in one of many layers shows
    here though it may drown on the way to the output. Only rows that have a gradient count: what queries that see
    nothing give, say, is anybody's choice, and whoever calls for it drops it."""
    found = []
    for number, (name, x) in enumerate(plain.modules.items()):
        rows, each = truth.rows.get(name), [found.modules.get(name) for found in (truth, plain, ours)]
        if rows is not None and all(y is not None and y.shape == x.shape for y in each) and rows.any():
            of_rows = ({name: y[rows]} for y in each)
            found += outputs_measured(*of_rows, math.sqrt(number + 1), computed_in)
    return found


def over_draws(draws: list[list[Quantity]]) -> list[Quantity]:
    """One quantity of each that was measured in all of several independent draws: that of the median draw. Of what
    rounding makes of a deep model, one draw in several says little: its tails are long, and a ReLU may flip."""
    by_name = [{x.name: x for x in draw} for draw in draws]
    names = (name for name in by_name[0] if all(name in draw for draw in by_name))
    return [sorted((draw[name] for draw in by_name), key=lambda x: x.ratio)[len(draws) // 2] for name in names]


def _quantity(
    name: str, truth: Named, plain: Named, ours: Named, size: float, swapped: float, computed_in: torch.dtype | None
) -> Quantity:
    complaint = _malformed(name, truth, plain, ours)
    if complaint is not None:
        return Quantity(name, math.nan, math.nan, math.nan, size, _norm(truth.get(name)), complaint)
    exact = truth[name]
    if not exact.is_floating_point():
        error, plain_error = (float((x[name] != exact).sum()) for x in (ours, plain))
        return Quantity(name, error, plain_error, 0.0, exact.numel(), exact.numel(), counts=True)
    exact = exact.double()
    error, plain_error = ((x[name].double() - exact).norm().item() for x in (ours, plain))
    rounding = 2 * swapped * torch.finfo(computed_in or ours[name].dtype).eps * size
    complaint = _not_finite(exact, plain[name], ours[name])
    return Quantity(name, error, plain_error, rounding, size, exact.norm().item(), complaint)


def _malformed(name: str, truth: Named, plain: Named, ours: Named) -> str | None:
    if name not in ours or name not in plain:
        return f"is there in the {'plain' if name in plain else 'accelerated'} model alone"
    if ours[name].shape != plain[name].shape:
        return f"has shape {tuple(ours[name].shape)} instead of {tuple(plain[name].shape)}"
    if torch.promote_types(ours[name].dtype, plain[name].dtype) != ours[name].dtype:  # wider is no worse
        return f"has dtype {ours[name].dtype} instead of {plain[name].dtype}"
    return None if name in truth and truth[name].shape == plain[name].shape else "has no truth to compare with"


def _not_finite(exact: Tensor, plain: Tensor, ours: Tensor) -> str | None:
    """No budget is made of NaN: where the plain model has them too, nobody can tell who is right."""
    bad = int((~ours.isfinite()).sum())
    too = not (plain.isfinite().all() and exact.isfinite().all())
    if bad:
        return f"has {bad} of {ours.numel()} elements NaN or infinite" + (" (in the plain model too)" if too else "")
    return "has elements that are NaN or infinite in the plain model" if too else None


def _all(plain: Named, ours: Named) -> list[str]:
    return list(dict.fromkeys([*plain, *ours]))


def _norm(x: Tensor | None) -> float:
    return x.double().norm().item() if x is not None else 0.0
