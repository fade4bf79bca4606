"""Correctness before speed: how far each result is from the truth, in units of its error budget."""

from __future__ import annotations

import torch

from ..check.budget import Quantity
from ..check.op import Call
from .cases import OPS
from .op import Truth, Values


def judge(values: Values, plain: Values | None, truth: Truth, call: Call, op_name: str, is_ours: bool) -> Quantity:
    """The worst of the quantities. Without plain values the budget is that much smaller. They are eager PyTorch's as it
    is measured, in the dtype of the inputs, but of what `plain_values` knows better.

    A peer may return its result in another dtype; what ours is in is a promise.
    """
    op = OPS[op_name].op.held_to_half()
    found = []
    for name, value in values.items():
        exact = truth.values[name]
        kind, plain_dtype = op.dtypes_of(name, call)
        quantity = Quantity(name, kind, plain_dtype)
        quantity.add(value if is_ours else value.to(kind), exact if plain is None else plain[name], exact,
                     truth.response.get(name, 0.0))  # fmt: skip
        found.append(quantity)
    return max(found, key=lambda quantity: quantity.ratio)


def plain_values(values: Values, function, call: Call, op_name: str) -> Values:
    """Eager PyTorch's values; a result that is exact to float32 is its float32 code's (see mmkernels.check.op)."""
    op = OPS[op_name].op
    if op.result not in op.wide:
        return values
    wide = call.in_dtype(torch.float32)
    with torch.no_grad():
        return values | {op.result: function(**wide.tensors, **wide.options)}
