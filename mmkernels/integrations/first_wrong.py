"""Where an accelerated model goes wrong: the first module whose result its inputs do not excuse.

Watched are the modules that were swapped and those around them; what is inside a swapped module is its own affair.
Going forward, the first output beyond its budget is the culprit's, since all that came before is right. Where all
outputs are right, some gradient is not: then the culprit is a swapped module whose parameters have a wrong gradient
although the gradient it was handed is right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .agreement import Named, Quantity, named_outputs, outputs_measured, without_padding

Call = tuple[str, int]  # the path of a module, and which of its calls


@dataclass(frozen=True)
class FirstWrong:
    path: str
    why: str


class Watch:
    """What the watched modules of one model return, call by call in the order in which they return, and the gradients
    that this is given. Registers hooks, and so changes the model."""

    def __init__(self, model: nn.Module, swapped: Iterable[str], attention_mask: object):
        self.returned: dict[Call, Named] = {}
        self.gradients: dict[Call, Named] = {}
        self.inside: list[str] = []  # entered and not left: where an exception came from
        self._mask = attention_mask
        self._calls: dict[str, int] = {}
        for path in {part for whole in ["", *swapped] for part in _parts(whole)}:
            module = model.get_submodule(path)
            module.register_forward_pre_hook(lambda *_, path=path: self._enter(path))
            module.register_forward_hook(lambda _, __, output, path=path: self._leave(path, output))

    def _enter(self, path: str) -> None:
        if not self._done():
            self.inside.append(path)

    def _leave(self, path: str, output: object) -> None:
        if self._done():
            return
        self.inside.pop()
        call = path, self._calls.get(path, 0)
        self._calls[path] = call[1] + 1
        outputs = named_outputs(output)
        self.returned[call] = {name: self._kept(x) for name, x in outputs.items()}
        for name, x in outputs.items():
            if x.requires_grad:
                x.register_hook(lambda gradient, name=name: self._add_gradient(call, name, gradient))

    def _done(self) -> bool:
        """The model itself has returned: what runs now is checkpointing, in the course of backward."""
        return "" in self._calls

    def _add_gradient(self, call: Call, name: str, gradient: Tensor) -> None:
        self.gradients.setdefault(call, {})[name] = self._kept(gradient)

    def _kept(self, x: Tensor) -> Tensor:
        return without_padding(x.detach(), self._mask).to("cpu", copy=True)  # what comes after may write to x


def first_wrong(
    exact: Watch,
    plain: Watch,
    ours: Watch,
    swapped: Collection[str],
    wrong_gradients: Collection[str],
    computed_in: torch.dtype | None,
) -> FirstWrong | None:
    """wrong_gradients: names of parameters. None: it cannot be told."""
    if ours.inside:
        return FirstWrong(ours.inside[-1], "the exception came from there")
    so_far = set()
    for call in plain.returned:
        so_far |= {call[0]} & set(swapped)
        measured = _measured(call, [x.returned for x in (exact, plain, ours)], len(so_far) or 1, computed_in)
        wrong = next((x for x in measured if not x.ok), None)
        if wrong is not None:
            return FirstWrong(call[0], f"its {wrong}")
    for call in reversed(plain.returned):
        path = call[0]
        around = any(path in _parts(other)[:-1] for other in swapped)  # the model itself, by its loss: it comes last
        own = next((name for name in wrong_gradients if name.startswith(f"{path}." if path else "")), None)
        if path not in swapped or own is None or around:
            continue
        handed = _measured(call, [x.gradients for x in (exact, plain, ours)], len(swapped), computed_in)
        if all(x.ok for x in handed):
            return FirstWrong(path, f"the gradient it is handed is right, that of {own} is not")
    return _around(swapped) if wrong_gradients else None


def _around(swapped: Collection[str]) -> FirstWrong | None:
    outer = [path for path in swapped if any(path in _parts(other)[:-1] for other in swapped)]
    return FirstWrong(outer[0], "gradients are wrong from there on") if outer else None


def _measured(
    call: Call, each: list[dict[Call, Named]], swapped: int, computed_in: torch.dtype | None
) -> list[Quantity]:
    """Of what all three have: attention weights, say, are there only if somebody computes them."""
    given = [x.get(call, {}) for x in each]
    common = [name for name in given[1] if all(name in x for x in given)]
    return outputs_measured(*({name: x[name] for name in common} for x in given), swapped, computed_in)


def _parts(path: str) -> list[str]:
    """The path and those above it, the model itself first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]
