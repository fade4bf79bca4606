"""What the check needs to know of an op: how to call it, what plain PyTorch writes instead, and what is special."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..spans import RowSpans
from .draw import Draw

Returned = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """The arguments of one call, which of them get a gradient, and what outputs beside the result are fed with."""

    tensors: dict[str, Tensor]
    options: dict[str, object] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    fed: dict[str, Tensor] = field(default_factory=dict)

    def in_dtype(self, dtype: torch.dtype) -> Call:
        """The same numbers in another dtype; what is not differentiable (uint8 images, mean, std) stays as it is."""
        moved = {name: x.to(dtype) if name in self.differentiable else x for name, x in self.tensors.items()}
        return replace(self, tensors=moved)

    def inputs(self) -> dict[str, Tensor]:
        """Every tensor of the call by name, those of its row spans too."""
        spans = self.options.get("spans")
        return self.tensors | ({"lo": spans.lo, "hi": spans.hi} if isinstance(spans, RowSpans) else {})


class Drawable(Protocol):
    """A call of an op that can be made of fresh numbers."""

    @property
    def op(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def quick(self) -> bool:
        """Small: of those that are checked, small enough for Triton's interpreter."""

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call: ...


class Case(Drawable, Protocol):
    """What is checked."""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]: ...

    @property
    def plain_draws(self) -> int:
        """So many more that measure plain PyTorch only."""

    def upstream(self, draw: Draw, result: Tensor) -> Tensor:
        """The gradient that a result like this one is fed with."""


@dataclass(frozen=True)
class Op:
    name: str
    outputs: tuple[str, ...]  # what it returns; the first is its result
    call: Callable[..., Returned]
    plain: Callable[..., Returned]  # the same in eager PyTorch as one writes it today, with autograd
    typed_by: str  # the argument in whose dtype it computes and returns
    seconds: tuple[float, float]  # that a case takes on one core of a server: here, and in Triton's interpreter
    # See mmkernels.check.budget; the largest of each quantity's elements, a gradient's for a result that is fed with 1.
    response: Callable[[Call], dict[str, float]] = lambda call: {}
    wide: tuple[str, ...] = ()  # outputs that are float32 even of half inputs
    # Outputs and gradients that are as exact as plain code in float32, even of half inputs: see mmkernels.check.budget.
    exact: tuple[str, ...] = ()
    # Whether kernels may round to the inputs' dtype on the way to those. `plain` in float32 is told which that is, as
    # `rounding`, and rounds what they may.
    rounds: bool = False
    plain_reference: bool = False  # the reference is plain code that computes in half types itself, and held to that
    # Arguments and outputs whose last axes may be put in another order, those of a group in the same one.
    orders: tuple[tuple[str, ...], ...] = ()
    # What else a backend may do wrong: the failures of `run`, which is `call` served by it.
    probe: Callable[[Call, Callable[..., Returned]], list[str]] = lambda call, run: []

    @property
    def result(self) -> str:
        return self.outputs[0]

    def named(self, returned: Returned) -> dict[str, Tensor]:
        """What a call returned by name: all outputs, or the first where it was not asked for more."""
        return dict(zip(self.outputs, returned if isinstance(returned, tuple) else (returned,), strict=False))

    def served_by(self, backend: str) -> Op:
        """What is promised of this backend's results."""
        return self.held_to_half() if self.plain_reference and backend == "reference" else self

    def held_to_half(self) -> Op:
        """The same where plain code computes what is not `wide` in the dtype of the inputs."""
        return replace(self, exact=self.wide)

    def dtypes_of(self, name: str, call: Call) -> tuple[torch.dtype, torch.dtype]:
        """Of an output or gradient: the dtype that is promised, and the one plain PyTorch computes it in."""
        dtype = call.tensors[self.typed_by].dtype
        wide = torch.promote_types(dtype, torch.float32)
        result = wide if name in self.wide else dtype
        promised = result if name in self.outputs else call.tensors[name.removeprefix("d_")].dtype
        return promised, wide if name in self.exact else dtype


def evaluate(
    function: Callable[..., Returned], call: Call, op: Op, upstream: Tensor, **options: object
) -> dict[str, Tensor]:
    """By name: what `function` returns, and the gradients of the result and of other outputs that the call feeds."""
    leaves = {name: call.tensors[name].detach().requires_grad_() for name in call.differentiable}
    outputs = op.named(function(**(call.tensors | leaves), **call.options, **options))
    fed = {op.result: upstream} | call.fed
    upstreams = [value.to(outputs[name]) for name, value in fed.items()]
    gradients = torch.autograd.grad(
        [outputs[name] for name in fed], list(leaves.values()), upstreams, allow_unused=True
    )
    named = {
        f"d_{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return {name: value.detach() for name, value in outputs.items()} | named


def evaluate_plain(op: Op, call: Call, upstream: Tensor) -> dict[str, Tensor]:
    """By name: what eager PyTorch makes of a call in its dtype, and in float32 where that much is promised."""
    dtype = call.tensors[op.typed_by].dtype
    if dtype == torch.float32 or not op.exact:
        return evaluate(op.plain, call, op, upstream)
    options = {"rounding": dtype} if op.rounds else {}
    found = evaluate(op.plain, call.in_dtype(torch.float32), op, upstream, **options)
    if set(found) <= set(op.exact):
        return found
    return evaluate(op.plain, call, op, upstream) | {name: found[name] for name in found if name in op.exact}
