"""timm.layers.Attention, that of ViT and most of its relatives, over span_attention."""

from __future__ import annotations

from timm.layers import attention
from torch import Tensor

from .. import backends
from . import _attend
from .report import count_fallback


class Attention(attention.Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        try:
            if self.training and self.attn_drop.p:
                raise _attend.NotSpans("dropout on the attention weights")
            return self._attend(x, attn_mask, is_causal)
        except _attend.NotSpans as reason:
            count_fallback(self, str(reason))
            return super().forward(x, attn_mask, is_causal)

    def _attend(self, x: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        tokens = x.shape[1]
        if mask is None:
            spans = _attend.full(tokens, tokens, x.device, causal=is_causal)
        elif mask.dim() != 4:
            raise _attend.NotSpans(f"a mask of {mask.dim()} axes")
        else:
            spans = _attend.kept(mask, (), lambda: _attend.spans_of(mask.expand(-1, -1, tokens, -1)))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # (B, N, H, D)
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
        out = self.norm(_attend.attend(q, k, v, spans, scale=self.scale, backend=backends.of_module(self)).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


SWAPS = {attention.Attention: (Attention, "attention")}
