"""Weights drawn anew, and noise that is the same in every dtype."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """With all weights anew, none of them zero: a gate that starts at zero would hide what it gates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(noise * 0.3 + (1.0 if "norm" in name.lower() or "bn" in name.lower() else 0.0))
            else:
                fan_in = max(1, parameter[0].numel()) if len(parameter) else 1
                parameter.copy_(noise * min(0.15, fan_in**-0.5))
    return as_measured(model)


def as_measured(model: nn.Module) -> nn.Module:
    """Without what keeps gradients from parameters, or a model from running in float64."""
    for module in model.modules():
        for name in ("freeze_lm_head", "freeze_text_layers"):
            if hasattr(module, name):
                setattr(module, name, False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped matrix products know no float64
    return model.requires_grad_(True).eval()


@contextmanager
def same_noise(seed: int = 0) -> Iterator[None]:
    """Whatever a model draws (masks, latents, dithering), it draws the same, in float64 as in float32."""
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)
    with _DrawnInFloat32():
        yield


class _DrawnInFloat32(TorchFunctionMode):
    """torch draws other numbers in float64: here they are drawn in float32, and widened."""

    FACTORIES = (torch.randn, torch.rand, torch.normal)
    LIKE = (torch.randn_like, torch.rand_like, torch.bernoulli)
    IN_PLACE = (Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.bernoulli_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.FACTORIES and kwargs.get("dtype") == torch.float64:
            return func(*args, **{**kwargs, "dtype": torch.float32}).double()
        if func in self.LIKE and args[0].dtype == torch.float64:
            return func(args[0].float(), *args[1:], **kwargs).double()
        if func in self.IN_PLACE and args[0].dtype == torch.float64:
            return args[0].copy_(func(args[0].float(), *args[1:], **kwargs))
        return func(*args, **kwargs)
