"""What of a model's run is compared: its outputs, and the gradients of a loss or of a fixed projection of them."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves

Named = dict[str, Tensor]
LOSS = "loss(output)"


@dataclass
class Values:
    """What a model computed, on the CPU. Outputs go by their path in what it returned (`logits`, `hidden_states.0`),
    gradients by the parameter or, where an input requires one, by `input <its name>`."""

    outputs: Named = field(default_factory=dict)
    gradients: Named = field(default_factory=dict)
    modules: Named = field(default_factory=dict)  # what those that were swapped return, by path, in that order
    rows: Named = field(default_factory=dict)  # bool: the rows of it that have a gradient, without which they count not


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
    are very negative, however much. A model may add a token of its own, before the others or behind them (VideoPrism).
    """
    mask = attention_mask
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask.bool()
        if x.dim() == 3 and x.shape[1] == mask.shape[1] + 1:
            mask = pad(mask, (0, 1), value=True) & pad(mask, (1, 0), value=True)
        if x.shape[:2] == mask.shape:
            x = x[mask]
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
