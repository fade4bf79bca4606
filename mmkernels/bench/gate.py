"""Correctness before speed: the truth of a case, and how far each result is from it in units of its error budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..check.budget import Quantity
from ..check.cases import OPS
from ..check.contrastive_truth import contrastive_truth
from ..check.op import Call, evaluate
from ..spans import RowSpans
from .cases import Case

ROWS = 256  # queries of attention whose truth is worked out at a time

Values = dict[str, Tensor]  # a result and its gradients, by name


@dataclass(frozen=True)
class Truth:
    values: Values
    response: dict[str, float]  # see mmkernels.check.budget


def truth_of(case: Case, call: Call, upstream: Tensor) -> Truth:
    """In float64: the reference, for losses and attention by chunks, which fit into memory at any size."""
    op = OPS[case.op]
    if case.op == "span_attention":
        return Truth(_attention_truth(call, upstream), {})
    if case.op in ("patch_embed", "rotary_embed"):
        return Truth(evaluate(op.call, call.in_dtype(torch.float64), op, upstream, backend="reference"), {})
    exact, response = _contrastive(case, call, torch.float64)
    return Truth(exact, {name: x.max().item() for name, x in response.items()})


def plain_by_chunks(case: Case, call: Call) -> Values | None:
    """What eager PyTorch would compute had it the memory: of a loss, in float32. None for other ops."""
    return _contrastive(case, call, torch.float32)[0] if case.op in ("clip_loss", "siglip_loss") else None


def _contrastive(case: Case, call: Call, dtype: torch.dtype) -> tuple[Values, Values]:
    """A loss and its gradients, and how far each responds to a rounded logit."""
    tensors = call.tensors
    scalars = [tensors[name].item() for name in ("logit_scale", "logit_bias") if name in tensors]
    found = contrastive_truth(case.op, tensors["image_features"], tensors["text_features"], *scalars, dtype=dtype)
    value, response = (
        {OPS[case.op].result: x.loss} | {f"d_{name}": x.gradients()[name] for name in call.differentiable}
        for x in found
    )
    return value, response


def _attention_truth(call: Call, upstream: Tensor) -> Values:
    """A block of queries at a time, with the keys from the first to the last that one of them sees."""
    op, wide = OPS["span_attention"], call.in_dtype(torch.float64)
    spans = call.options["layout"].spans()
    truth = {"out": torch.zeros_like(wide.tensors["q"])}
    truth |= {f"d_{name}": torch.zeros_like(x) for name, x in wide.tensors.items()}
    for start in range(0, spans.num_queries, ROWS):
        rows = slice(start, start + ROWS)
        lo, hi = spans.lo[rows], spans.hi[rows]
        keys = slice(int(lo.min()), int(hi.max()))
        part = {"spans": RowSpans(lo - keys.start, hi - keys.start, keys.stop - keys.start)}
        places = {"q": rows, "k": keys, "v": keys}
        tensors = {name: x[..., places[name], :, :] for name, x in wide.tensors.items()}
        block = Call(tensors, part, call.differentiable)
        values = evaluate(op.call, block, op, upstream[..., rows, :, :], backend="reference")
        for name, value in values.items():
            truth[name][..., places.get(name.removeprefix("d_"), rows), :, :] += value
    return truth


def judge(values: Values, plain: Values | None, truth: Truth, call: Call, op_name: str, is_ours: bool) -> Quantity:
    """The worst of the quantities. Without plain values the budget is that much smaller.

    A peer may return its loss in another dtype; what we promise is that ours is float32.
    """
    op = OPS[op_name]
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
    """Eager PyTorch's values, with the loss of half features from its float32 code (see mmkernels.check.op)."""
    op = OPS[op_name]
    if op.result not in op.wide:
        return values
    wide = call.in_dtype(torch.float32)
    with torch.no_grad():
        return values | {op.result: function(**wide.tensors, **wide.options)}
