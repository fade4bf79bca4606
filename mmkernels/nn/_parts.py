"""What the attention modules are made of besides attention, what they check, and how they take over the parts of
another module."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` that takes activations of another dtype than its weight's, which autocast hands it, computes
    in the wider of the two, and returns the activations' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases: SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202), named as
    Llama's."""

    def __init__(self, embed_dim: int, hidden_dim: int, **options) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, bias=False, **options)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias=False, **options)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def check_tokens(taker: str, label: str, x: Tensor, width: int) -> None:
    if x.dim() not in (2, 3) or x.shape[-1] != width:
        raise ValueError(
            f"{taker}: {label} has shape {tuple(x.shape)}; it must be packed, (tokens, {width}), or "
            f"(batch, tokens, {width})"
        )


def part(taker: str, source: nn.Module, *names: str) -> Any:
    """The attribute of `source` that bears one of these names, which models choose differently."""
    for name in names:
        if hasattr(source, name):
            return getattr(source, name)
    raise TypeError(f"{taker}: {type(source).__name__} has no {' or '.join(names)}; its form is unknown")


def check_dropout(taker: str, source: nn.Module, *names: str) -> None:
    """Attributes so named, if `source` has them, are rates of dropout, which has no place here."""
    for name in names:
        rate = getattr(source, name, 0.0)
        if isinstance(rate, float) and rate:
            raise ValueError(
                f"{taker}: {name} of {type(source).__name__} is {rate}, a rate of dropout, and nothing is dropped out "
                "here: set it to 0.0"
            )


def check_takeover(taker: nn.Module, source: nn.Module, but: Container[str] = ()) -> None:
    """Nothing of `source` may be lost, except for parts so named: what has no place here would change the result."""
    taken = {id(x) for x in (*taker.parameters(), *taker.modules())}
    leaves = [(name, x) for name, x in source.named_modules() if not list(x.children()) and not list(x.parameters())]
    parts = [*source.named_parameters(), *leaves]
    left = [name for name, x in parts if id(x) not in taken and name.rpartition(".")[2] not in but]
    if left:
        raise ValueError(f"{type(taker).__name__}: it has no place for {', '.join(left)} of {type(source).__name__}")
