"""What the bench needs to know of an op beside what the check does: what a user would run instead, and what is right at
sizes that the reference has not the memory for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..check.draw import Draw
from ..check.op import Call, Drawable, Op, evaluate

PASSES = ("fwd", "fwd_bwd")
DTYPES = (torch.float32, torch.bfloat16)  # measured unless others are asked for

Function = Callable[..., Tensor]
Values = dict[str, Tensor]  # a result and its gradients, by name


@dataclass(frozen=True)
class Truth:
    values: Values
    response: dict[str, float]  # see mmkernels.check.budget


@dataclass(frozen=True)
class Peer:
    """What a user would run instead, at its best. It takes the arguments of the op it stands for."""

    name: str
    function: Function
    compiled: bool = False
    passes: tuple[str, ...] = PASSES


class Case(Drawable, Protocol):
    """What is measured: a call of the size of a real training run or a real model, and what it costs at least."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Where it is measured unless others are asked for."""

    @property
    def compiled(self) -> tuple[str, ...]:
        """Devices where something compiled is a peer too; each pass takes half a minute."""

    @property
    def passes(self) -> tuple[str, ...]: ...

    def upstream(self, draw: Draw, call: Call) -> Tensor:
        """The gradient that the result is fed with."""

    def flops(self, direction: str) -> int:
        """The least number of operations of a pass."""

    def bytes(self, direction: str, call: Call) -> int:
        """What a pass must read and write."""

    def eager_bytes(self, direction: str, call: Call) -> int:
        """About what eager PyTorch holds at its peak."""


@dataclass(frozen=True)
class Series:
    """Calls that differ in one size alone, along which time and memory grow."""

    op: str
    name: str
    axis: str  # what the sizes count, and what stays as it is
    cases: Mapping[int, Case]  # by size


def compile_best(best: Peer, device: str) -> Peer:
    return Peer(f"compiled {best.name}", torch.compile(best.function, dynamic=False), compiled=True)


@dataclass(frozen=True)
class Measured:
    op: Op  # its `call` is what is measured as ours
    # The first is what models do today ("eager"); its error is also what the error budget is made of.
    peers: Callable[[Call], list[Peer]]
    several_peers: bool = False  # whether there may be others beside eager
    compile: Callable[[Peer, str], Peer] = compile_best  # of the best peer and a device
    eager: str | None = None  # what a table says that eager is, if not its name
    truth_by_chunks: Callable[[Call, Tensor], Truth] | None = None  # where the whole reference would not fit
    plain_by_chunks: Callable[[Call], Values | None] = lambda call: None  # what eager would compute had it the memory

    def truth(self, call: Call, upstream: Tensor) -> Truth:
        """In float64."""
        if self.truth_by_chunks:
            return self.truth_by_chunks(call, upstream)
        wide = call.in_dtype(torch.float64)
        return Truth(evaluate(self.op.call, wide, self.op, upstream, backend="reference"), {})
