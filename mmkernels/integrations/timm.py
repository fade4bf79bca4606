"""timm.layers.Attention, that of ViT and most of its relatives, over span_attention."""

from __future__ import annotations

import inspect

import timm
from timm.layers import attention
from torch import Tensor, nn

from .. import backends
from . import _attend
from ._tracing import is_traced
from .finding import Finding
from .report import count_fallback
from .swap import plain_class


class Attention:
    """Mixed in before timm's."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not isinstance(x, Tensor) or is_traced():
            return super().forward(x, attn_mask, is_causal)
        try:
            self._refuse(attn_mask, is_causal)
            return self._attend(x, attn_mask, is_causal)
        except _attend.NotSpans as reason:
            count_fallback(self, str(reason))
            return super().forward(x, attn_mask, is_causal)

    def _refuse(self, mask: Tensor | None, is_causal: bool) -> None:
        if self.training and self.attn_drop.p:
            raise _attend.NotSpans("dropout on the attention weights")
        if not self.fused_attn and (self.attn_drop._forward_hooks or self.attn_drop._forward_pre_hooks):
            raise _attend.NotSpans("a hook on attn_drop takes the attention weights")
        if mask is not None and (is_causal or mask.dim() != 4):
            raise _attend.NotSpans("a mask beside is_causal" if is_causal else f"a mask of {mask.dim()} axes")

    def _attend(self, x: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        tokens = x.shape[1]
        if mask is None:
            spans = _attend.full(tokens, tokens, x.device, causal=is_causal)
        else:
            wide = mask.expand(-1, -1, tokens, tokens)
            spans = _attend.kept(mask, tuple(wide.shape), lambda: _attend.spans_of(wide))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # (B, N, H, D)
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
        out = self.norm(_attend.attend(q, k, v, spans, scale=self.scale, backend=backends.of_module(self)).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def fits() -> str | None:
    """Why the attention of the installed timm is none that `Attention` knows; None: it is."""
    wanted = ["self", "x", "attn_mask", "is_causal"]
    parts = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop", "fused_attn"}
    has = set(attention.Attention.__init__.__code__.co_names)
    if list(inspect.signature(attention.Attention.forward).parameters) != wanted or not parts <= has:
        return f"timm {timm.__version__} has an attention that mmkernels does not know"
    return None


def swapped(model: nn.Module) -> None:
    pass


def restored(model: nn.Module) -> None:
    pass


def find(module: nn.Module, path: str, parent: nn.Module | None) -> list[Finding]:
    return [Finding("attention", parts=(Attention,))] if plain_class(module) is attention.Attention else []
