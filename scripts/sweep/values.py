"""What a model computes: every output by its name, and gradients.

As tests/integrations/agreement.py has it, whose budget is used. Outputs keep their names here, since an accelerated
model may return less: attention weights that nobody asked for, which eager attention gives all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from agreement import Values
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from mmkernels.integrations.values import without_padding

LEFT_OUT = {"past_key_values", "mems", "cache_params", "past_buckets_states", "state"}


def values(model: nn.Module, inputs: dict[str, Any], gradients: bool) -> Values:
    """Every floating output, and the gradient of every parameter of a scalar made of them. Where a row of tokens is
    padding, models compute what they like: it does not count."""
    model.zero_grad()
    mask = inputs.get("attention_mask")
    outputs = {name: without_padding(x, mask) for name, x in _tensors(model(**inputs)).items()}
    found = {f"output {name}": x.detach() for name, x in outputs.items()}
    if gradients:
        of = [x for x in outputs.values() if x.requires_grad]
        if not of:
            raise NoGradient
        weighed = (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in of)
        sum(x.sum() / x.numel() ** 0.5 for x in weighed).backward()
        found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found


class NoGradient(Exception):
    """No output depends on a parameter, as far as autograd can see."""


def _tensors(output: Any) -> dict[str, Tensor]:
    leaves, _ = tree_flatten_with_path(_plain(output))
    named = {keystr(path) or "itself": x for path, x in leaves}
    return {k: x for k, x in named.items() if isinstance(x, Tensor) and x.is_floating_point() and x.numel()}


def _plain(output: Any) -> Any:
    """Outputs as dicts and lists of tensors, without caches, which are of the language model's own making."""
    if hasattr(output, "items"):
        kept = (name for name in output if name not in LEFT_OUT and not str(name).endswith("attentions"))
        return {name: _plain(output[name]) for name in kept}
    if isinstance(output, (list, tuple)):
        return [_plain(x) for x in output]
    return output
