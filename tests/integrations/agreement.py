"""What the tests of accelerate share: mmkernels' own rule of how wrong a model may be (integrations/agreement.py), on
models that are called by keywords, as flat dicts of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmkernels import accelerate, restore
from mmkernels.integrations import agreement
from mmkernels.integrations import values as compared

Values = dict[str, Tensor]


def in_float64(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def values(model: nn.Module, inputs: dict, gradients: bool = True) -> Values:
    """Every floating output as `output <its path>`, and the gradient of every parameter of a scalar made of them."""
    found = compared.values(model, (), inputs, gradients=gradients)
    outputs = {f"output {name}": x for name, x in found.outputs.items() if x.is_floating_point()}
    return outputs | found.gradients


def disagreements(model: nn.Module, fast: nn.Module, swapped: int, inputs: dict, gradients: bool = True) -> list[str]:
    return [str(quantity) for quantity in compare(model, fast, swapped, inputs, gradients) if not quantity.ok]


def compare(model: nn.Module, fast: nn.Module, swapped: int, inputs: dict, gradients: bool) -> list[agreement.Quantity]:
    truth = values(copy.deepcopy(model).double(), tree_map(in_float64, inputs), gradients)
    return measured(truth, *(values(x, inputs, gradients) for x in (model, fast)), swapped)


def misses(
    truth: Values, plain: Values, ours: Values, swapped: int, computed_in: torch.dtype | None = None
) -> list[str]:
    """What is beyond its budget, and by how much. computed_in: the dtype of autocast, where that is not the values'."""
    return [str(quantity) for quantity in measured(truth, plain, ours, swapped, computed_in) if not quantity.ok]


def measured(
    truth: Values, plain: Values, ours: Values, swapped: int, computed_in: torch.dtype | None = None
) -> list[agreement.Quantity]:
    assert list(truth) == list(plain) == list(ours)
    outputs, gradients = agreement.measured(*map(_sorted, (truth, plain, ours)), swapped, computed_in)
    return [*outputs, *gradients]


def _sorted(found: Values) -> compared.Values:
    outputs = {name: compared.without_padding(x, None) for name, x in found.items() if name.startswith("output")}
    return compared.Values(outputs, {name: x for name, x in found.items() if name not in outputs})


def assert_agrees(model: nn.Module, inputs: dict, gradients: bool = True) -> nn.Module:
    """Accelerates a copy of the model, compares, and returns the copy. The plain model is left as it was."""
    fast, swapped = accelerated(model)
    found = disagreements(model, fast, swapped, inputs, gradients)
    assert not found, "\n".join(found)
    return fast


def assert_agrees_over_draws(draw: Callable[[], tuple[nn.Module, dict]], count: int = 5) -> nn.Module:
    """The same of the median of several draws, where one in thirty is far off by rounding alone: the last copy."""
    draws = []
    for _ in range(count):
        model, inputs = draw()
        fast, swapped = accelerated(model)
        draws.append(compare(model, fast, swapped, inputs, gradients=True))
    found = [str(quantity) for quantity in agreement.over_draws(draws) if not quantity.ok]
    assert not found, "\n".join(found)
    return fast


def accelerated(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy, and how many of its modules were swapped."""
    fast = copy.deepcopy(model)
    swapped = len(accelerate(fast, verbose=False).swapped)
    assert list(fast.state_dict()) == list(model.state_dict())
    return fast, swapped


def assert_restored(model: nn.Module, fast: nn.Module, inputs: dict) -> None:
    restore(fast)
    theirs, ours = (values(x, inputs, gradients=False) for x in (model, fast))
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    for (path, before), after in zip(model.named_modules(), fast.modules(), strict=True):
        assert type(before) is type(after) and before.__dict__.keys() == after.__dict__.keys(), path
        names = (getattr(getattr(x, "config", None), "_attn_implementation", None) for x in (before, after))
        assert len(set(names)) == 1, path
