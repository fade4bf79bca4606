"""Subclasses of torch's own modules, to swap in place: same parameters, same state_dict, same hooks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..nn.patch_embed import PatchConv2d, PatchConv3d
from ..spans import RowSpans
from . import _attend
from .report import count_fallback

PATCH_CONVOLUTIONS = {nn.Conv2d: PatchConv2d, nn.Conv3d: PatchConv3d}


def why_no_patches(conv: nn.Conv2d | nn.Conv3d) -> str | None:
    """Why a convolution is no patch embedding; None: it is one. One of 1 x 1 pixels cuts no patches either."""
    ones = (1,) * len(conv.kernel_size)
    if conv.stride != conv.kernel_size:
        return "its stride is not its kernel"
    if conv.padding not in ("valid", (0,) * len(ones)):
        return "it is padded"
    if conv.dilation != ones or conv.groups != 1:
        return "it is dilated or grouped"
    return "its kernel is one pixel" if conv.kernel_size == ones else None


class SpanMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` over span_attention, where the caller does without the attention weights."""

    weights_unused = False  # True: it drops them, though it does not say so

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        try:
            self._refuse(query, need_weights)
            return self._attend(query, key, value, key_padding_mask, attn_mask), None
        except _attend.NotSpans as reason:
            count_fallback(self, str(reason))
        if attn_mask is not None and attn_mask.dtype == torch.int64:
            attn_mask = ~self._spans_of_code(attn_mask, query).to_dense().repeat_interleave(self.num_heads, 0)
        return super().forward(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def _refuse(self, query: Tensor, need_weights: bool) -> None:
        if need_weights and not self.weights_unused:
            raise _attend.NotSpans("need_weights")
        if self.training and self.dropout:
            raise _attend.NotSpans("dropout on the attention weights")
        if query.dim() != 3 or query.is_nested:
            raise _attend.NotSpans("a query without a batch axis")
        if self.bias_k is not None or self.add_zero_attn:
            raise _attend.NotSpans("bias_k or add_zero_attn")

    def _attend(self, query, key, value, key_padding_mask, attn_mask) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in self._project(query, key, value))
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        spans = self._spans(attn_mask, key_padding_mask, q, k, query)
        out = self.out_proj(_attend.attend(q, k, v, spans, backend=backends.of_module(self)).flatten(2))
        return out if self.batch_first else out.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim and query is key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(*given) for given in zip((query, key, value), weights, biases, strict=True))

    def _spans(self, attn_mask, key_padding_mask, q: Tensor, k: Tensor, query: Tensor) -> RowSpans:
        """Of torch's masks: bool (True: not seen) or additive; of (Lq, Lk), (B * heads, Lq, Lk) and (B, Lk)."""
        queries, keys = q.shape[2], k.shape[2]
        if attn_mask is None:
            spans = _attend.full(queries, keys, q.device)
        elif attn_mask.dtype == torch.int64:
            spans = self._spans_of_code(attn_mask, query)
        else:
            spans = _attend.kept(attn_mask, (self.num_heads, queries), lambda: self._spans_of_mask(attn_mask))
        if key_padding_mask is None:
            return spans
        if spans.runs > 1:
            raise _attend.NotSpans("key_padding_mask beside a mask of several runs")
        padding = _attend.spans_of(_negated(key_padding_mask)[:, None, None].expand(-1, 1, queries, -1))
        return RowSpans(torch.maximum(spans.lo, padding.lo), torch.minimum(spans.hi, padding.hi), keys)

    def _spans_of_mask(self, mask: Tensor) -> RowSpans:
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
        return _attend.spans_of(_negated(mask))

    def _spans_of_code(self, code: Tensor, query: Tensor) -> RowSpans:
        """A code of transformers' spans (transformers/codes.py) that the caller repeated over the heads."""
        from .transformers.codes import decode

        batch = query.shape[0 if self.batch_first else 1]
        return decode(code.view(batch, self.num_heads, -1, *code.shape[1:])[:, 0])


class SpanMultiheadAttentionWithoutWeights(SpanMultiheadAttention):
    weights_unused = True


def _negated(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask
