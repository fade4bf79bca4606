"""Running the cases: every kernel equals its reference, within the error budget, and to the bit with itself.

One definition for `mmkernels check`, for the tests and for whoever writes the next backend.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import backends
from .budget import Quantity, largest
from .cases import CASES, OPS
from .draw import DRAWS, Draw
from .op import Call, Case, Op, evaluate, evaluate_plain
from .poison import poisoned
from .precision import exact_float32

ORDERS = 3  # in which plain PyTorch computes the same again, of ops that have several
THREADS = (2, 3)  # that the CPU kernels are run on too; everything else is small and runs on one

SMALL_PLAIN_DRAWS = 20  # of plain PyTorch where a case is small: the largest of few errors is luck
CLOSE, CLOSE_DRAWS = 2.0, 20  # a budget overrun by less may be luck on either side, which more draws of both settle


@dataclass
class Outcome:
    """How a backend did on one case in one dtype."""

    op: str
    case: str
    backend: str
    dtype: str
    device: str
    seed: int
    quantities: list[Quantity] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unsupported: str | None = None  # the backend says it cannot serve the call

    @property
    def passed(self) -> bool:
        return not self.failures and self.unsupported is None

    @property
    def ratio(self) -> float:
        """The worst error of the case in units of its budget."""
        return max((quantity.ratio for quantity in self.quantities), default=0.0)

    def record(self) -> dict:
        """The outcome as JSON holds it."""
        own = {
            name: getattr(self, name) for name in ("op", "case", "backend", "dtype", "device", "seed", "unsupported")
        }
        measured = [
            {"name": x.name, "error": None if x.complaint else x.error, "budget": x.budget} for x in self.quantities
        ]  # fmt: skip
        return own | {"failures": self.failures, "quantities": measured, "reproduce": self.reproduce()}

    def reproduce(self) -> str:
        words = ["mmkernels", "check", "--op", self.op, "--case", self.case, "--backend", self.backend]
        words += ["--dtype", self.dtype, "--device", self.device, "--seed", str(self.seed)]
        return shlex.join(words)


def select(
    op: str | None = None, case: str | None = None, dtype: str | None = None, quick: bool = False
) -> Iterator[tuple[Case, torch.dtype]]:
    """The cases asked for, each with a dtype it is checked in."""
    for each in CASES:
        if op in (None, each.op) and case in (None, each.name) and (each.quick or not quick):
            for kind in each.dtypes:
                if dtype in (None, name_of(kind)):
                    yield each, kind


def run_case(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", seed: int = 0) -> Outcome:
    """Check one case in one dtype. Whatever goes wrong is in the outcome; nothing is raised."""
    outcome = Outcome(case.op, case.name, backend, name_of(dtype), device, seed)
    try:
        outcome.unsupported = _unsupported(case, dtype, outcome)
        if outcome.unsupported:
            return outcome
        quantities: dict[str, Quantity] = {}
        with exact_float32(), _threads(1):
            for number in range(DRAWS):
                _check_draw(case, dtype, outcome, number, quantities)
            plain_draws = max(case.plain_draws, SMALL_PLAIN_DRAWS if case.quick else 0)
            for number in range(DRAWS, DRAWS + plain_draws):
                _Drawn.of(case, dtype, outcome, number).add_plain(quantities)
            drawn = DRAWS + plain_draws
            if 1 < max(quantity.ratio for quantity in quantities.values()) < CLOSE:
                for number in range(drawn, drawn + CLOSE_DRAWS):
                    _check_draw(case, dtype, outcome, number, quantities)
        outcome.quantities = list(quantities.values())
        outcome.failures += filter(None, (quantity.failure() for quantity in outcome.quantities))
    except Exception as error:
        outcome.failures.append(f"raised {type(error).__name__}: {error}")
    return outcome


def _unsupported(case: Case, dtype: torch.dtype, outcome: Outcome) -> str | None:
    """Why the backend does not serve the case, asked before the truth is worked out for it."""
    op, call = OPS[case.op], case.make(Draw(outcome.seed, case.op, case.name, 0), dtype, outcome.device)
    candidates = backends.explain(op.call, **call.tensors, **call.options)
    (reason,) = (each.reason for each in candidates if each.backend == outcome.backend)
    return reason and f"{case.op}: backend {outcome.backend!r} cannot serve this call: {reason}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Drawn:
    """One draw of a case: a call, and what it should give."""

    op: Op
    call: Call
    upstream: Tensor
    truth: dict[str, Tensor]
    plains: list[dict[str, Tensor]]
    responses: dict[str, float]

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, outcome: Outcome, number: int) -> _Drawn:
        op = OPS[case.op].served_by(outcome.backend)
        draw = Draw(outcome.seed, case.op, case.name, number)
        call = case.make(draw, dtype, outcome.device)
        wide = call.in_dtype(torch.float64)
        with torch.no_grad():
            shape_like = op.named(op.call(**wide.tensors, **wide.options, backend="reference"))[op.result]
        upstream = case.upstream(draw, shape_like).to(outcome.device, dtype)
        truth = evaluate(op.call, wide, op, upstream, backend="reference")
        plains = [evaluate_plain(op, call, upstream)]
        if dtype == torch.float32:  # half numbers are rounded too coarsely for any order to matter
            plains += [_plain_in_another_order(op, call, upstream, draw) for _ in range(ORDERS if op.orders else 0)]
        fed = largest(upstream)  # all gradients are multiples of it
        responses = {name: x if name in op.outputs else x * fed for name, x in op.response(call).items()}
        return cls(op, call, upstream, truth, plains, responses)

    def add_plain(self, quantities: dict[str, Quantity]) -> None:
        for plain in self.plains:
            for name in plain:
                quantities[name].add_plain(plain[name], self.truth[name], self.responses.get(name, 0.0))


def _plain_in_another_order(op: Op, call: Call, upstream: Tensor, draw: Draw) -> dict[str, Tensor]:
    """The same results with other roundings, put back in place; not those that are exact to float32."""
    order: dict[str, Tensor] = {}
    for group in op.orders:
        order |= dict.fromkeys(group, draw.order(call.tensors[group[0]].shape[-1]).to(upstream.device))
    tensors = {name: x[..., order[name]] if name in order else x for name, x in call.tensors.items()}
    values = evaluate(op.plain, replace(call, tensors=tensors), op, upstream[..., order[op.result]])
    back = {name: order.get(name.removeprefix("d_")) for name in values if name not in op.wide}
    return {name: values[name] if x is None else values[name][..., x.argsort()] for name, x in back.items()}


def _check_draw(case: Case, dtype: torch.dtype, outcome: Outcome, number: int, quantities: dict[str, Quantity]) -> None:
    drawn = _Drawn.of(case, dtype, outcome, number)
    op, call, upstream = drawn.op, drawn.call, drawn.upstream
    before = {name: x.clone() for name, x in call.inputs().items()}
    with poisoned():
        ours = evaluate(op.call, call, op, upstream, backend=outcome.backend)
    outcome.failures += [f"{name} was written to" for name, x in call.inputs().items() if not _same(x, before[name])]
    for name, value in ours.items():
        expected, plain_dtype = op.dtypes_of(name, call)
        quantities.setdefault(name, Quantity(name, expected, plain_dtype)).add_ours(value, drawn.truth[name])
    drawn.add_plain(quantities)
    if number == 0 and outcome.backend != "reference":  # what torch's own products do is not ours to promise
        outcome.failures += _unsteady(op, call, upstream, outcome, ours)
    if number == 0:
        outcome.failures += op.probe(call, functools.partial(op.call, backend=outcome.backend))


def _unsteady(op: Op, call: Call, upstream: Tensor, outcome: Outcome, first: dict[str, Tensor]) -> list[str]:
    """Run again, on the CPU with other numbers of threads: every bit must stay."""
    found = []
    for threads in THREADS if outcome.backend == "cpu" else (1,):
        with _threads(threads), _no_synchronisation(outcome.device):
            again = evaluate(op.call, call, op, upstream, backend=outcome.backend)
        moved = [name for name, value in again.items() if not _same(value, first[name])]
        if moved:
            found.append(f"{', '.join(moved)}: a second run, on {threads} threads, gives other bits than one on 1")
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_synchronisation(device: str) -> Iterator[None]:
    """On a GPU, an error where the host waits for the device: no kernel of ours may need that."""
    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit (NaN equals the same NaN)."""
    one, other = one.reshape(-1).contiguous(), other.reshape(-1).contiguous()
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
