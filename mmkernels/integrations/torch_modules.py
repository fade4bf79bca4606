"""torch's own modules, swapped in place: same parameters, same state_dict, same hooks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..nn.patch_embed import PatchConv2d, PatchConv3d
from ..spans import RowSpans
from . import _attend
from ._tracing import Drawn
from .finding import Finding
from .report import count_fallback
from .swap import plain_class

_PATCH_CONVOLUTIONS = {nn.Conv2d: PatchConv2d, nn.Conv3d: PatchConv3d}


class ChannelsLast:
    """Mixed in before them: models flatten the maps and transpose them, which copies nothing then."""

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images)


def fits() -> str | None:
    return None


def swapped(model: nn.Module) -> None:
    pass


def restored(model: nn.Module) -> None:
    pass


def find(module: nn.Module, path: str, parent: nn.Module | None) -> list[Finding]:
    cls, name = plain_class(module), path.rsplit(".", 1)[-1]
    above = "" if parent is None else plain_class(parent).__name__
    if cls in _PATCH_CONVOLUTIONS:
        return _find_patches(module, cls, name, above)
    if cls is nn.Linear and "patch_embed" in name:
        return [Finding("patch embedding", left="a matrix product already")]
    if cls is nn.MultiheadAttention:
        new = SpanMultiheadAttentionWithoutWeights if above in _DROP_WEIGHTS else SpanMultiheadAttention
        return [Finding("attention", parts=(new, Drawn))]
    return []


def _find_patches(conv: nn.Module, cls: type, name: str, above: str) -> list[Finding]:
    reason = _why_no_patches(conv)
    if reason is not None:
        return [Finding("patch embedding", left=f"a convolution, and {reason}")] if "patch" in name else []
    embeds = "patch" in name or "Patch" in above or "Embed" in above or conv.in_channels <= 4
    what = None if embeds else "convolution whose stride is its kernel"
    return [Finding("patch embedding", parts=(_PATCH_CONVOLUTIONS[cls], ChannelsLast, Drawn), what=what)]


def _why_no_patches(conv: nn.Conv2d | nn.Conv3d) -> str | None:
    """Why a convolution cuts no patches; None: it does. One of 1 x 1 pixels cuts none either."""
    ones = (1,) * len(conv.kernel_size)
    if conv.stride != conv.kernel_size:
        return "its stride is not its kernel"
    if conv.padding not in ("valid", (0,) * len(ones)):
        return "it is padded"
    if conv.dilation != ones or conv.groups != 1:
        return "it is dilated or grouped"
    return "its kernel is one pixel" if conv.kernel_size == ones else None


# Pooling heads that take the weights of torch's attention and drop them.
_DROP_WEIGHTS = {"SiglipMultiheadAttentionPoolingHead", "Siglip2MultiheadAttentionPoolingHead", "AriaCrossAttention"}


class SpanMultiheadAttention:
    """Mixed in before torch.nn.MultiheadAttention: span_attention, where the caller does without the weights."""

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
            self._refuse(query, key, value, need_weights)
            self._refuse_masks(query, key, attn_mask, key_padding_mask, is_causal)
            return self._attend(query, key, value, key_padding_mask, attn_mask, is_causal, need_weights), None
        except _attend.NotSpans as reason:
            count_fallback(self, str(reason))
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
        weights = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
        return super().forward(query, key, value, **masks, **weights)

    def _refuse(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> None:
        """What is torch's to compute, or to raise for."""
        if need_weights and not self.weights_unused:
            raise _attend.NotSpans("need_weights")
        if self.training and self.dropout:
            raise _attend.NotSpans("dropout on the attention weights")
        if any(x.dim() != 3 or x.is_nested for x in (query, key, value)):
            raise _attend.NotSpans("a query, key or value without a batch axis")
        if self.bias_k is not None or self.add_zero_attn:
            raise _attend.NotSpans("bias_k or add_zero_attn")
        batch = 0 if self.batch_first else 1
        same = key.shape[:2] == value.shape[:2] and query.shape[batch] == key.shape[batch]
        widths = [x.shape[2] for x in (query, key, value)]
        if not same or widths != [self.embed_dim, self.kdim, self.vdim]:
            raise _attend.NotSpans("shapes that do not go together")

    def _refuse_masks(
        self, query: Tensor, key: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool
    ) -> None:
        tokens, batch = (1, 0) if self.batch_first else (0, 1)
        rows, queries, keys = query.shape[batch], query.shape[tokens], key.shape[tokens]
        if causal and mask is None:
            raise _attend.NotSpans("is_causal without a mask")
        if mask is not None and tuple(mask.shape) not in ((queries, keys), (rows * self.num_heads, queries, keys)):
            raise _attend.NotSpans("a mask of another shape")
        if padding is not None and tuple(padding.shape) != (rows, keys):
            raise _attend.NotSpans("a key_padding_mask of another shape")
        for given in (mask, padding):
            if given is not None and given.dtype != torch.bool and not given.is_floating_point():
                raise _attend.NotSpans(f"a mask of {given.dtype}")

    def _attend(self, query, key, value, padding, mask, is_causal: bool, need_weights: bool) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in self._project(query, key, value))
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # torch takes the hint for the mask where nothing else needs one.
        only_causal = is_causal and padding is None and not need_weights
        spans = self._spans(None if only_causal else mask, padding, only_causal, q, k)
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

    def _spans(self, mask: Tensor | None, padding: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> RowSpans:
        """Of torch's masks: bool (True: not seen) or additive; of (Lq, Lk), (B * heads, Lq, Lk) and (B, Lk)."""
        queries, keys = q.shape[2], k.shape[2]
        if mask is None:
            spans = _attend.full(queries, keys, q.device, causal=causal)
        else:
            spans = _attend.kept(mask, self.num_heads, lambda: self._spans_of_mask(mask))
        if padding is None:
            return spans
        if spans.runs > 1:
            raise _attend.NotSpans("key_padding_mask beside a mask of several runs")
        wide = _negated(padding)[:, None, None].expand(-1, 1, queries, -1)
        seen = _attend.kept(padding, queries, lambda: _attend.spans_of(wide))
        return RowSpans(torch.maximum(spans.lo, seen.lo), torch.minimum(spans.hi, seen.hi), keys)

    def _spans_of_mask(self, mask: Tensor) -> RowSpans:
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
        return _attend.spans_of(_negated(mask))


class SpanMultiheadAttentionWithoutWeights(SpanMultiheadAttention):
    weights_unused = True


def _negated(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask
