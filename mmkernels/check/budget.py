"""How wrong an implementation may be.

    truth   the reference in float64, on float64 copies of the very same, already rounded inputs
    plain   eager PyTorch as a user writes it, in the dtype of the inputs
    passes  |ours - truth|  <=  2 max |plain - truth| + 2 ulp + response

for each element of every output and every gradient, an ulp being that of the quantity's dtype at max |truth|. An
infinite truth (the log-sum-exp of no keys) has to be met exactly.

What is promised to float32 whatever the inputs are (`Op.exact`) is held to what eager code in float32 makes of the same
numbers: half code would excuse a loss that is off in its fifth digit, or a small gradient that is lost. Where kernels
may round to the inputs' dtype on the way, and the contract says so, that code does too, and nowhere else. A result of a
half type is rounded in the end, each element by itself; it may be off by what float32 code may be, its ulps those of
float32, and by 2 ulp of its own dtype at its own size, which the largest element does not lend to a small one.

A quantity of many elements averages luck out: the largest of many errors hardly moves from draw to draw. One of few
elements, a scalar above all (the loss, the gradient of a scale or a bias), does not: plain code that happens to round
to the truth would leave its rivals a budget of nothing. Therefore errors are the largest over several independent
draws, and the error of a plain scalar counts as at least half an ulp of the dtype it was computed in, which is what
anyone knows about it. Where the elements are very few, more draws of the plain one tell how large it gets. And where a
budget is overrun by less than twice, many more draws of both are compared before that counts: the largest errors of so
many hardly move.

How much rounding can spoil depends on the draw: one key that many queries cling to makes all of it. Attention's
gradients are like that, and there plain PyTorch also answers for the same numbers in other orders (the elements of a
head permuted, which changes no result and every rounding); its error is the largest of these.

`response` is how far the quantity moves when every logit of a loss moves by 2 ulp of float32. Logits are rounded before
they are exponentiated, whoever does it, and the answer is a difference of such terms; where that difference cancels
(one pair, or pairs that are already aligned), an ulp of what is left measures nothing. Of attention it is said of the
log-sum-exp of capped scores alone; elsewhere it is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def ulp(dtype: torch.dtype, size: float) -> float:
    """The distance between neighbouring numbers of `dtype` at magnitude `size`, subnormal numbers included."""
    info = torch.finfo(dtype)
    below = 2.0 ** (math.frexp(size)[1] - 1) if size else 0.0
    return max(below, info.tiny) * info.eps


def ulps(dtype: torch.dtype, x: Tensor) -> Tensor:
    """The same of each element."""
    info = torch.finfo(dtype)
    _, exponents = torch.frexp(x.double().abs().clamp(info.tiny, info.max))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponents - 1)


@dataclass
class Quantity:
    """One output or gradient of a case: the largest errors met so far, and what they may be."""

    name: str
    dtype: torch.dtype  # of the result
    plain_dtype: torch.dtype  # that plain PyTorch computed it in
    plain_error: float = 0.0
    size: float = 0.0  # max |truth|
    response: float = 0.0
    complaint: str | None = None  # what no error budget excuses: a NaN, a wrong shape
    errors: dict[float, float] = field(default_factory=dict)  # the largest by the ulp of the elements' last rounding

    def add(self, ours: Tensor, plain: Tensor, truth: Tensor, response: float = 0.0) -> None:
        """Take in one draw."""
        self.add_plain(plain, truth, response)
        self.add_ours(ours, truth)

    def add_ours(self, ours: Tensor, truth: Tensor) -> None:
        self.complaint = self.complaint or self._malformed(ours, truth)
        if self.complaint:
            return
        errors = _errors(ours, truth)
        last = ulps(self.dtype, truth) if self._is_rounded_in_the_end else torch.zeros_like(errors)
        for place in last.unique():
            error = largest(errors[last == place])
            self.errors[place.item()] = max(self.errors.get(place.item(), 0.0), error)

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
    def _is_rounded_in_the_end(self) -> bool:
        return torch.finfo(self.dtype).eps > torch.finfo(self.plain_dtype).eps

    @property
    def allowance(self) -> float:
        """What any element may be off by before its last rounding, if that is to fewer digits than plain code has."""
        dtype = self.plain_dtype if self._is_rounded_in_the_end else self.dtype
        return 2 * self.plain_error + 2 * ulp(dtype, self.size) + self.response

    @property
    def worst(self) -> tuple[float, float]:
        """Error and budget of the element whose error is the largest in units of its budget."""
        found = [(error, self.allowance + 2 * last) for last, error in self.errors.items()]
        return max(found, key=lambda each: each[0] / each[1], default=(0.0, self.allowance))

    @property
    def error(self) -> float:
        return self.worst[0]

    @property
    def budget(self) -> float:
        return self.worst[1]

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


def _errors(value: Tensor, truth: Tensor) -> Tensor:
    value = value.double()
    return torch.where(value == truth, 0.0, value - truth).abs()


def distance(value: Tensor, truth: Tensor) -> float:
    return largest(_errors(value, truth))


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
