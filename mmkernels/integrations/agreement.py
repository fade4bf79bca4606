"""Whether an accelerated model computes what the plain one does: what is compared, and how wrong it may be.

    truth   the plain model in float64, on the very same weights and inputs
    passes  ||ours - truth||  <=  2 ||plain - truth||  +  2 ulp for each module that was swapped

in the norm over all elements of an output or gradient: what an op's own budget allows, added over the layers. A maximum
over the elements would be a lottery after so many of them. What is no floating number (ids) has to be equal; where the
plain model itself flips some of them in its dtype, twice as many may be flipped.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Named = dict[str, Tensor]
LOSS = "loss(output)"


@dataclass
class Values:
    """What a model computed, on the CPU. Outputs go by their path in what it returned (`logits`, `hidden_states.0`),
    gradients by the parameter or, where an input requires one, by `input <its name>`."""

    outputs: Named = field(default_factory=dict)
    gradients: Named = field(default_factory=dict)


# ---- what is compared


def values(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    *,
    loss: Callable[[object], Tensor] | None = None,
    gradients: bool = True,
    projection: Projection | None = None,
) -> Values:
    """Every output, and the gradient of every parameter. The model is left without gradients."""
    found = step(model, args, kwargs, loss=loss, gradients=gradients, projection=projection)
    leaves = named_inputs(args, kwargs) | {
        name.removeprefix("_orig_mod."): p  # torch.compile's prefix
        for name, p in model.named_parameters()
    }
    grads = {name: x.grad for name, x in leaves.items() if x.is_leaf and x.grad is not None}
    model.zero_grad()
    on_host = (
        {name: (x.to_dense() if x.is_sparse else x).detach().cpu() for name, x in each.items()}
        for each in (found, grads)
    )
    return Values(*on_host)


def step(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    *,
    loss: Callable[[object], Tensor] | None = None,
    gradients: bool = True,
    projection: Projection | None = None,
    all_outputs: bool = True,
) -> Named:
    """Forward and, where anything requires a gradient, backward: of `loss`, or of a fixed random projection of every
    floating output. Returns the outputs; not `all_outputs`: where there is a loss, the loss alone, so that what it
    does without stays unread."""
    model.zero_grad()
    with torch.set_grad_enabled(gradients):
        output = model(*args, **kwargs)
        outputs = counted(output, kwargs.get("attention_mask")) if all_outputs or loss is None else {}
        if loss is not None:
            outputs[LOSS] = _checked(loss(output), any(x.requires_grad for x in outputs.values()))
    starts = {name: x for name, x in outputs.items() if x.requires_grad and x.numel() and (name == LOSS or not loss)}
    project = projection or Projection()
    if starts:
        weights = [torch.ones_like(x) if loss else project(name, x) for name, x in starts.items()]
        torch.autograd.backward(list(starts.values()), weights)
    return outputs


def _checked(loss: object, differentiable: bool) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f"compare: loss returned {given}; a floating tensor of one element is needed")
    if differentiable and not loss.requires_grad:
        raise TypeError(
            "compare: loss returned a tensor that does not depend on the model's outputs: it has no gradient"
        )
    return loss


class Projection:
    """The gradient that each output is given: random signs, the same in every run and, since every dtype holds them
    exactly, in every dtype; scaled so that a large output does not drown a small one."""

    def __init__(self):
        self._signs: Named = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        held = self._signs.get(name)
        if held is None or held.shape != x.shape or held.device != x.device:
            generator = torch.Generator(x.device).manual_seed(zlib.crc32(name.encode()))
            held = torch.randint(0, 2, x.shape, generator=generator, device=x.device, dtype=torch.int8) * 2 - 1
            self._signs[name] = held
        return held.to(x.dtype) * 2.0 ** -round(math.log2(x.numel()) / 2)


def counted(output: object, attention_mask: object) -> Named:
    """The outputs, as far as they count."""
    return {name: without_padding(x, attention_mask) for name, x in named_outputs(output).items()}


def without_padding(x: Tensor, attention_mask: object) -> Tensor:
    """Where a row of tokens is padding, models compute what they like; and logits of tokens that a model must not say
    are very negative, however much."""
    mask = attention_mask
    if isinstance(mask, Tensor) and mask.dim() == 2 and x.shape[:2] == mask.shape:
        x = x[mask.bool()]
    return x.masked_fill(x < -1e30, 0.0) if x.is_floating_point() else x


def named_outputs(output: object) -> Named:
    """Tensors and numbers by their path, without caches, which are of the language model's own making."""
    return dict(_named(output, ""))


def _named(output: object, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield path or "output", torch.view_as_real(output) if output.is_complex() else output
    elif isinstance(output, (bool, int, float)):
        yield path or "output", torch.tensor(output)
    else:
        for name, x in _children(output):
            if name != "past_key_values":
                yield from _named(x, f"{path}.{name}" if path else name)


def _children(output: object) -> Iterator[tuple[str, object]]:
    if isinstance(output, Mapping) or hasattr(output, "items"):
        yield from ((str(name), x) for name, x in output.items())
    elif isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", range(len(output)))  # of a namedtuple
        yield from ((str(name), x) for name, x in zip(names, output, strict=True))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from ((one.name, getattr(output, one.name)) for one in dataclasses.fields(output))


def named_inputs(args: tuple, kwargs: dict) -> Named:
    """The floating tensors among a call's arguments, which may require a gradient."""
    named = [*((str(i), x) for i, x in enumerate(args)), *kwargs.items()]
    found = {}
    for name, x in named:
        tensors = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for i, tensor in enumerate(tensors):
            found[f"input {name}" if len(tensors) == 1 else f"input {name}.{i}"] = tensor
    return found


# ---- how wrong it may be


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
    truth: Named, plain: Named, ours: Named, swapped: int, computed_in: torch.dtype | None = None
) -> list[Quantity]:
    """computed_in: the dtype of autocast, where that is not the values'."""
    return [
        _quantity(name, truth, plain, ours, _norm(truth.get(name)), swapped, computed_in) for name in _all(plain, ours)
    ]


def gradients_measured(
    truth: Values, plain: Values, ours: Values, swapped: int, computed_in: torch.dtype | None = None
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
    truth: Values, plain: Values, ours: Values, swapped: int, computed_in: torch.dtype | None = None
) -> tuple[list[Quantity], list[Quantity]]:
    """The outputs, and the gradients."""
    outputs = outputs_measured(truth.outputs, plain.outputs, ours.outputs, swapped, computed_in)
    return outputs, gradients_measured(truth, plain, ours, swapped, computed_in)


def over_draws(draws: list[list[Quantity]]) -> list[Quantity]:
    """One quantity of each that was measured in several independent draws: the norm over all of them."""
    found = []
    for same in zip(*draws, strict=True):
        summed = (
            math.hypot(*(getattr(x, name) for x in same))
            for name in ("error", "plain_error", "rounding", "size", "norm")
        )
        complaint = next((x.complaint for x in same if x.complaint), None)
        found.append(Quantity(same[0].name, *summed, complaint, same[0].counts))
    return found


def _quantity(
    name: str, truth: Named, plain: Named, ours: Named, size: float, swapped: int, computed_in: torch.dtype | None
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
