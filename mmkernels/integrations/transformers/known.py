"""What transformers' classes say of themselves."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.compiler.assume_constant_result
def supports_sdpa(config: type) -> bool:
    """Whether the models of a class of configs attend by sdpa where nobody asks for something else. Those that do not
    make additive masks alone, and see every key where they made none."""
    return _supports_sdpa(config)


@functools.cache  # inside: Dynamo looks through a cache, and traces what is behind it
def _supports_sdpa(config: type) -> bool:
    modeling = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    models = [x for x in vars(modeling).values() if _is_model_of(x, config)] if modeling else []
    return not models or any(model._supports_sdpa for model in models)


def _is_model_of(value: object, config: type) -> bool:
    return isinstance(value, type) and issubclass(value, PreTrainedModel) and value.config_class is config


def eager_function(module: nn.Module) -> Callable | None:
    """The attention that is written out in the modeling file of a module."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    return None
