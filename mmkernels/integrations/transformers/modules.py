"""Modules of transformers that do not go through AttentionInterface, or not rightly: subclasses to swap in place.

Each keeps the parameters of the class it extends, and hands on to its forward what spans do not express.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.idefics import perceiver as idefics_perceiver
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.mllama import modeling_mllama as mllama
from transformers.models.perceiver import modeling_perceiver as perceiver

from ... import backends
from ...ops.patch_embed import patch_embed
from .. import _attend
from ..report import count_fallback


class IdeficsPerceiverAttention(idefics_perceiver.IdeficsPerceiverAttention):
    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        context, latents = self.context_layer_norm(context), self.latents_layer_norm(latents)
        both = torch.cat([context, latents], dim=-2)
        projected = self.q_proj(latents), self.k_proj(both), self.v_proj(both)
        q, k, v = (x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for x in projected)
        if self.qk_layer_norms:
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        spans = _attend.full(q.shape[2], k.shape[2], q.device)
        out = _attend.attend(q, k, v, spans, scale=self.qk_scale, backend=backends.of_module(self))
        return self.output_proj(out.flatten(-2))


class PerceiverSelfAttention(perceiver.PerceiverSelfAttention):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        mask = attention_mask if inputs is None else inputs_mask
        try:
            if output_attentions:
                raise _attend.NotSpans("output_attentions")
            if self.training and self.dropout.p:
                raise _attend.NotSpans("dropout on the attention weights")
            return (self._attend(hidden_states, inputs, mask),)
        except _attend.NotSpans as reason:
            count_fallback(self, str(reason))
            return super().forward(hidden_states, attention_mask, inputs, inputs_mask, output_attentions)

    def _attend(self, hidden_states: Tensor, inputs: Tensor | None, mask: Tensor | None) -> Tensor:
        hidden = self.layernorm1(hidden_states)
        source = hidden if inputs is None else self.layernorm2(inputs)
        q = self.transpose_for_scores(self.query(hidden), self.qk_channels_per_head)
        k = self.transpose_for_scores(self.key(source), self.qk_channels_per_head)
        v = self.transpose_for_scores(self.value(source), self.v_channels_per_head)
        if mask is None:
            spans = _attend.full(q.shape[2], k.shape[2], q.device)
        else:
            wide = mask.expand(-1, -1, q.shape[2], -1)
            spans = _attend.kept(mask, (q.shape[2],), lambda: _attend.spans_of(wide))
        return _attend.attend(q, k, v, spans, backend=backends.of_module(self)).flatten(2)


class MllamaTextCrossAttention(mllama.MllamaTextCrossAttention):
    """Goes through the interface, but has no `is_causal`, without which no mask reads as a causal one; and it gets the
    text's cu_seq_lens, which say nothing of tiles."""

    is_causal = False

    def forward(self, *args, **kwargs):
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            kwargs.pop(name, None)
        return super().forward(*args, **kwargs)


class Llama4UnfoldConvolution(llama4.Llama4UnfoldConvolution):
    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.linear.weight.unflatten(1, (-1, *self.unfold.kernel_size))  # unfold's order is a convolution's
        return patch_embed(hidden_states, weight, self.linear.bias, backend=backends.of_module(self))


SWAPS = {
    idefics_perceiver.IdeficsPerceiverAttention: (IdeficsPerceiverAttention, "attention"),
    perceiver.PerceiverSelfAttention: (PerceiverSelfAttention, "attention"),
    mllama.MllamaTextCrossAttention: (MllamaTextCrossAttention, "attention"),
    llama4.Llama4UnfoldConvolution: (Llama4UnfoldConvolution, "patch embedding"),
}
