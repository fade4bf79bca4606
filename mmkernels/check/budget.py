"""How wrong an implementation may be.

    truth   the reference in float64, on float64 copies of the very same, already rounded inputs
    plain   eager PyTorch as a user writes it, in the dtype of the inputs
    passes  max |ours - truth|  <=  2 max |plain - truth| + 2 ulp + response

for every output and every gradient, an ulp being that of the quantity's dtype at max |truth|. An infinite truth (the
log-sum-exp of no keys) has to be met exactly.

A quantity of many elements averages luck out: the largest of many errors hardly moves from draw to draw. One of few
elements, a scalar above all (the loss, the gradient of a scale or a bias), does not: plain code that happens to round
to the truth would leave its rivals a budget of nothing. Therefore errors are the largest over several independent
draws, and the error of a plain scalar counts as at least half an ulp of the dtype it was computed in, which is what
anyone knows about it. Where the two errors are equally large on average (features normalised in half precision) or the
elements very few, more draws of the plain one tell how large it gets. And where a budget is overrun by less than
twice, many more draws of both are compared before that counts: the largest errors of so many hardly move.

How much rounding can spoil depends on the draw: one key that many queries cling to makes all of it. Attention's
gradients are like that, and there plain PyTorch also answers for the same numbers in other orders (the elements of a
head permuted, which changes no result and every rounding); its error is the largest of these.

`response` is how far the quantity moves when every logit of a loss moves by 2 ulp of float32. Logits are rounded before
they are exponentiated, whoever does it, and the answer is a difference of such terms; where that difference cancels
(one pair, or pairs that are already aligned), an ulp of what is left measures nothing. It is zero for ops without an
exponential.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def ulp(dtype: torch.dtype, size: float) -> float:
    """The distance between neighbouring numbers of `dtype` at magnitude `size`, subnormal numbers included."""
    info = torch.finfo(dtype)
    below = 2.0 ** (math.frexp(size)[1] - 1) if size else 0.0
    return max(below, info.tiny) * info.eps


@dataclass
class Quantity:
    """One output or gradient of a case: the largest errors met so far, and what they may be."""

    name: str
    dtype: torch.dtype  # of the result
    plain_dtype: torch.dtype  # that plain PyTorch computed it in
    error: float = 0.0
    plain_error: float = 0.0
    size: float = 0.0  # max |truth|
    response: float = 0.0
    complaint: str | None = None  # what no error budget excuses: a NaN, a wrong shape

    def add(self, ours: Tensor, plain: Tensor, truth: Tensor, response: float = 0.0) -> None:
        """Take in one draw."""
        self.add_plain(plain, truth, response)
        self.add_ours(ours, truth)

    def add_ours(self, ours: Tensor, truth: Tensor) -> None:
        self.complaint = self.complaint or self._malformed(ours, truth)
        if not self.complaint:
            self.error = max(self.error, distance(ours, truth))

    def add_plain(self, plain: Tensor, truth: Tensor, response: float = 0.0) -> None:
        """Take in a draw that only tells how wrong plain PyTorch can be."""
        if not _finite_or_equal(plain, truth).all():
            raise ArithmeticError(
                f"plain PyTorch overflows on {self.name} and gives no budget: the case is too extreme"
            )
        self.plain_error = max(self.plain_error, distance(plain, truth))
        self.size = max(self.size, largest(truth[truth.isfinite()]))
        self.response = max(self.response, response)
        if truth.numel() == 1:
            self.plain_error = max(self.plain_error, ulp(self.plain_dtype, self.size) / 2)

    @property
    def budget(self) -> float:
        return 2 * self.plain_error + 2 * ulp(self.dtype, self.size) + self.response

    @property
    def ratio(self) -> float:
        """The error in units of the budget; at most 1 passes."""
        return math.inf if self.complaint else self.error / self.budget

    def failure(self) -> str | None:
        if self.complaint:
            return f"{self.name} {self.complaint}"
        if self.ratio <= 1:
            return None
        return (
            f"{self.name} is off by {self.error:.3g}, {self.ratio:.3g} times its budget of {self.budget:.3g} "
            f"(plain PyTorch is off by {self.plain_error:.3g}, the largest element is {self.size:.3g})"
        )

    def _malformed(self, ours: Tensor, truth: Tensor) -> str | None:
        if ours.shape != truth.shape:
            return f"has shape {tuple(ours.shape)} instead of {tuple(truth.shape)}"
        if ours.dtype != self.dtype:
            return f"has dtype {ours.dtype} instead of {self.dtype}"
        bad = ~_finite_or_equal(ours, truth)
        if not bad.any():
            return None
        where = tuple(bad.nonzero()[0].tolist())
        return f"has {int(bad.sum())} of {ours.numel()} elements NaN or infinite, the first at {where}"


def _finite_or_equal(value: Tensor, truth: Tensor) -> Tensor:
    return value.isfinite() | (value.double() == truth)


def distance(value: Tensor, truth: Tensor) -> float:
    value = value.double()
    return largest(torch.where(value == truth, 0.0, value - truth))


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
