"""Modules of transformers that do not go through AttentionInterface, or not only: what is mixed in before their class.

Each uses the parameters of the class it is mixed into, and hands on to its forward what spans do not express. They are
known by name, so that no model is imported for its own sake.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ... import backends
from ...ops.patch_embed import patch_embed
from ...ops.rotary_embed import rotary_embed
from .. import _attend
from .._tracing import is_traced
from ..report import count_fallback
from .attention import Interface
from .documents import told
from .known import eager_function
from .tiles import rows_that_see


class IdeficsPerceiverAttention:
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


class PerceiverSelfAttention:
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
            wide = mask.expand(-1, -1, q.shape[2], k.shape[2])
            spans = _attend.kept(mask, tuple(wide.shape), lambda: _attend.spans_of(wide))
        return _attend.attend(q, k, v, spans, backend=backends.of_module(self)).flatten(2)


class MllamaTextCrossAttention:
    """Gets the text's cu_seq_lens, which say nothing of tiles: its mask has them (tiles.py). Rows of documents without
    pictures see nothing, and take nothing, whoever attends."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            kwargs.pop(name, None)
        out, weights = super().forward(hidden_states, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        if told() is not None and mask is not None:
            out = out * rows_that_see(mask, out.shape[1])
        return out, weights


class RotaryVisionAttention:
    """Of Qwen's towers: queries and keys, which lie side by side in the projection, are turned in one pass, and all
    pictures and windows attend in one call."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        if position_embeddings is None or is_traced() or not _attend.has_kernel("rotary_embed", hidden_states):
            return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        heads = self.num_heads
        both, v = self.qkv(hidden_states).unflatten(-1, (3 * heads, -1)).split([2 * heads, heads], 1)
        asked = backends.of_module(self)
        fit = asked if asked and backends.is_written("rotary_embed", asked) else None
        q, k = rotary_embed(both, *position_embeddings, backend=fit).chunk(2, 1)
        kwargs |= {"scaling": self.scaling, "dropout": self.attention_dropout if self.training else 0.0}
        kwargs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "is_causal": False}
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attend = Interface(ALL_ATTENTION_FUNCTIONS).get_interface(
            self.config._attn_implementation, eager_function(self)
        )
        out, _ = attend(self, q, k, v, None, **kwargs)
        return self.proj(out.flatten(-2)[0])


class Llama4UnfoldConvolution:
    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.linear.weight.unflatten(1, (-1, *self.unfold.kernel_size))  # unfold's order is a convolution's
        return patch_embed(hidden_states, weight, self.linear.bias, backend=backends.of_module(self))


_QWEN = ["qwen2_vl.modeling_qwen2_vl.VisionAttention"]
_QWEN += [
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention",
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionAttention",
]

MODULES = {  # by the name of a class within transformers.models: what is mixed in, and the kind of hot path
    **dict.fromkeys(_QWEN, (RotaryVisionAttention, "attention")),
    "idefics.perceiver.IdeficsPerceiverAttention": (IdeficsPerceiverAttention, "attention"),
    "perceiver.modeling_perceiver.PerceiverSelfAttention": (PerceiverSelfAttention, "attention"),
    "mllama.modeling_mllama.MllamaTextCrossAttention": (MllamaTextCrossAttention, "attention"),
    "llama4.modeling_llama4.Llama4UnfoldConvolution": (Llama4UnfoldConvolution, "patch embedding"),
}
