"""An accelerated model's configs: its own, and true of what it attends by.

transformers gives all models that are made of one config the same object. What is set on it is set on all of them, and
on those that are made of it later; so a model that attends by mmkernels gets copies, in which the name of its attention
is "mmkernels" where it was "sdpa". It is there to be read: what attends is decided by the classes of modules
(exchange.py). A model that was loaded with "eager" keeps that name, which is how it is asked for attention weights.
"""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedConfig

from ..swap import swap_of
from .attention import NAME

_BEFORE = "_mmkernels_attention"  # on a module that holds a config whose name was changed: that name


def give(model: nn.Module) -> None:
    """Copies of all configs in the model, where one of them is to have another name; else none."""
    holders = [x for x in model.modules() if swap_of(x) and _name(vars(x).get("config")) == "sdpa"]
    if not holders:
        return
    copies: dict[int, object] = {}  # deepcopy's memo: what shared a config still does
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[attribute] = copy.deepcopy(value, copies)
    for module in holders:
        module.config._attn_implementation_internal = NAME
        vars(module)[_BEFORE] = "sdpa"


def take_back(model: nn.Module) -> None:
    """The names as they were. The copies stay, with what was set on them since."""
    for module in model.modules():
        before = vars(module).pop(_BEFORE, None)
        if before is not None and _name(module.config) == NAME:
            module.config._attn_implementation_internal = before


def _name(config: object) -> str | None:
    return getattr(config, "_attn_implementation", None)
