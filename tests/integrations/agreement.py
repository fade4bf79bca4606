"""Whether an accelerated model computes what the plain one does, within the error budget of the kernels.

The plain model in float64 is the truth. In the norm over all elements of a tensor, the accelerated model may be off by
at most twice as much as the plain one in the same dtype, plus 2 ulp for each module that was swapped: what an op's own
budget allows, added over the layers. A maximum over the elements would be a lottery after so many of them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mmkernels import accelerate, restore

Values = dict[str, Tensor]


def in_float64(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def values(model: nn.Module, inputs: dict, gradients: bool = True) -> Values:
    """Every floating output, and the gradient of every parameter of a scalar made of them. Where a row of tokens is
    padding, models compute what they like: it does not count."""
    model.zero_grad()
    outputs = [x for x in tree_leaves(_plain(model(**inputs))) if isinstance(x, Tensor) and x.is_floating_point()]
    outputs = [_counting(x, inputs.get("attention_mask")) for x in outputs]
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if gradients:
        weighed = (
            x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs if x.requires_grad
        )
        sum(x.sum() / x.numel() ** 0.5 for x in weighed).backward()
        named = ((name.removeprefix("_orig_mod."), p) for name, p in model.named_parameters())  # torch.compile's prefix
        found |= {name: p.grad.clone() for name, p in named if p.grad is not None}
    return found


def _plain(output):
    """Outputs as dicts of tensors, without caches, which are of the language model's own making."""
    if hasattr(output, "items"):
        return {name: _plain(x) for name, x in output.items() if name != "past_key_values"}
    return output


def _counting(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and x.shape[:2] == mask.shape:
        x = x[mask.bool()]
    return x.masked_fill(x < -1e30, 0.0)  # chameleon's logits of tokens it must not say


def disagreements(model: nn.Module, fast: nn.Module, swapped: int, inputs: dict, gradients: bool = True) -> list[str]:
    truth = values(copy.deepcopy(model).double(), tree_map(in_float64, inputs), gradients)
    return misses(truth, *(values(x, inputs, gradients) for x in (model, fast)), swapped)


def misses(
    truth: Values, plain: Values, ours: Values, swapped: int, computed_in: torch.dtype | None = None
) -> list[str]:
    """What is beyond its budget, and by how much. computed_in: the dtype of autocast, where that is not the values'."""
    assert list(truth) == list(plain) == list(ours)
    found = []
    for name, exact in truth.items():
        error, theirs = ((x[name].double() - exact).norm() for x in (ours, plain))
        ulps = 2 * swapped * torch.finfo(computed_in or ours[name].dtype).eps
        if not error <= 2 * theirs + ulps * _what_rounds(name, truth):
            found.append(f"{name} is off by {error:.2e}, plain by {theirs:.2e}, of {exact.norm():.2e}")
    return found


def _what_rounds(name: str, truth: Values) -> Tensor:
    """Gradients cancel: that of a key projection's bias is zero but for rounding. What rounds is as large as the
    gradients that flow beside it. That of a temperature, one number, is a sum over the terms of the loss."""
    if name.startswith("output"):
        return truth[name].norm()
    scalar = truth[name].dim() == 0
    return max(x.norm() for other, x in truth.items() if not other.startswith("output") or (scalar and x.dim() == 0))


def assert_agrees(model: nn.Module, inputs: dict, gradients: bool = True) -> nn.Module:
    """Accelerates a copy of the model, compares, and returns the copy. The plain model is left as it was."""
    fast = copy.deepcopy(model)
    swapped = len(accelerate(fast, verbose=False).swapped)
    assert list(fast.state_dict()) == list(model.state_dict())
    found = disagreements(model, fast, swapped, inputs, gradients)
    assert not found, "\n".join(found)
    return fast


def assert_restored(model: nn.Module, fast: nn.Module, inputs: dict) -> None:
    restore(fast)
    theirs, ours = (values(x, inputs, gradients=False) for x in (model, fast))
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    for (path, before), after in zip(model.named_modules(), fast.modules(), strict=True):
        assert type(before) is type(after) and before.__dict__.keys() == after.__dict__.keys(), path
        names = (getattr(getattr(x, "config", None), "_attn_implementation", None) for x in (before, after))
        assert len(set(names)) == 1, path
