"""Self- and cross-attention layers in which each query sees the runs of keys that `RowSpans` gives it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.rotary_embed import rotary_embed
from ..ops.span_attention import span_attention
from ..spans import RowSpans
from ._parts import RMSNorm, check_dropout, check_takeover, check_tokens, part


class _SpanAttention(nn.Module):
    """What SpanSelfAttention and SpanCrossAttention share: the layers and where they come from."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: Literal["rms", "layer"] | None = None,
        eps: float = 1e-6,
        scale: float | None = None,
        softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"{name}: embed_dim {embed_dim} is no multiple of num_heads {num_heads}; give head_dim")
        if num_heads % kv_heads:
            raise ValueError(f"{name}: num_heads {num_heads} is no multiple of num_kv_heads {kv_heads}")
        if qk_norm not in (None, "rms", "layer"):
            raise ValueError(f"{name}: qk_norm is {qk_norm!r}; accepted are 'rms', 'layer' and None")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.scale, self.softcap = scale, softcap
        options = {"device": device, "dtype": dtype}
        kv_dim = embed_dim if kv_dim is None else kv_dim
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, qkv_bias, **options)
        self.k_proj = nn.Linear(kv_dim, kv_heads * self.head_dim, qkv_bias, **options)
        self.v_proj = nn.Linear(kv_dim, kv_heads * self.head_dim, qkv_bias, **options)
        self.o_proj = nn.Linear(num_heads * self.head_dim, embed_dim, out_bias, **options)
        norm = {"rms": RMSNorm, "layer": nn.LayerNorm}.get(qk_norm)
        self.q_norm = norm(self.head_dim, eps, **options) if norm else None
        self.k_norm = norm(self.head_dim, eps, **options) if norm else None

    @classmethod
    def from_transformers(cls, attention: nn.Module):
        """The same layer on the very submodules of an attention layer of transformers, adapters and hooks included.

        Served are layers with separate projections q_proj, k_proj, v_proj and o_proj (out_proj, output_proj), norms of
        queries and keys per head if any, and heads split after the projections: those of Llama, Mistral, Qwen2, Qwen3,
        Gemma 1 to 3, CLIP, SigLIP, idefics, idefics2, mllama and others. What the layer masks, a sliding window too, is
        the spans' business.

        Raises:
            TypeError, ValueError: a part is missing, or there is one that this layer has no place for; the message
                names it. Dropout is such a part.
        """
        module = cls._on_parts_of(attention)
        check_takeover(module, attention, but=("rotary_emb",))  # whose tables the caller hands to the call
        return module

    @classmethod
    def _on_parts_of(cls, attention: nn.Module):
        """`from_transformers` for a layer that holds more than attention."""
        name = cls.__name__
        check_dropout(name, attention, "dropout", "attention_dropout")
        q_proj, head_dim = part(name, attention, "q_proj"), part(name, attention, "head_dim")
        module = cls(q_proj.in_features, q_proj.out_features // head_dim, head_dim=head_dim, device="meta")
        module.q_proj = q_proj
        module.k_proj, module.v_proj = part(name, attention, "k_proj"), part(name, attention, "v_proj")
        module.o_proj = part(name, attention, "o_proj", "out_proj", "output_proj")
        module.q_norm = getattr(attention, "q_norm", None) or getattr(attention, "q_layer_norm", None)
        module.k_norm = getattr(attention, "k_norm", None) or getattr(attention, "k_layer_norm", None)
        module.scale = part(name, attention, "scaling", "scale", "qk_scale")
        module.softcap = getattr(attention, "attn_logit_softcapping", None)
        _check_norms(module, attention)
        return module.train(attention.training)

    def queries(self, hidden: Tensor) -> Tensor:
        """(..., T, embed_dim) -> (..., T, num_heads, head_dim), normalised if the layer does so."""
        return self._heads(self.q_proj(hidden), self.q_norm)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(..., T, kv_dim) -> keys, normalised if the layer does so, and values: (..., T, num_kv_heads, head_dim)."""
        return self._heads(self.k_proj(context), self.k_norm), self._heads(self.v_proj(context))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spans: RowSpans) -> Tensor:
        """Attention and the output projection. -> (..., T, embed_dim)"""
        return self.o_proj(span_attention(q, k, v, spans, scale=self.scale, softcap=self.softcap).flatten(-2))

    def _heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        return x if norm is None else norm(x)

    def extra_repr(self) -> str:
        heads, kv_heads = (layer.out_features // self.head_dim for layer in (self.q_proj, self.k_proj))
        shown = f"num_heads={heads}, num_kv_heads={kv_heads}, head_dim={self.head_dim}"
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            shown += "" if value is None else f", {name}={value:g}"
        return shown


class SpanSelfAttention(_SpanAttention):
    """Self-attention over `mmkernels.span_attention`: packed documents, windows, images inside text, as the spans say.

    Args: those of SpanCrossAttention but `kv_dim`.

    Parameters: `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `q_norm`, `k_norm` where asked for, named as Llama's and
    Qwen3's, whose state_dict loads as it stands. There is no dropout.
    """

    def __init__(self, embed_dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, kv_dim=embed_dim, **options)

    def forward(
        self, hidden: Tensor, spans: RowSpans, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Args:
            hidden: packed (T, embed_dim), or (B, T, embed_dim).
            spans: which tokens each token sees; without a batch axis they serve every row of the batch.
            position_embeddings: cos and sin, each (T, head_dim) or with the batch axis before, of a rotary embedding
                applied to halves of a head (Llama's rotate_half; Su et al. 2021, https://arxiv.org/abs/2104.09864). It
                must be given here, since it stands between the norms and attention; the tables come from the caller,
                since models differ in the positions they turn into angles and compute them once for all layers.

        Returns: the shape of hidden. A token that sees nothing gets the output projection's bias.
        """
        check_tokens("SpanSelfAttention", "hidden", hidden, self.q_proj.in_features)
        q = self.queries(hidden)
        k, v = self.keys_values(hidden)
        if position_embeddings is not None:
            _check_rotary(hidden, self.head_dim, *position_embeddings)
            q, k = (rotary_embed(x, *position_embeddings) for x in (q, k))
        return self.attend(q, k, v, spans)


class SpanCrossAttention(_SpanAttention):
    """Attention from one sequence to another, text to image tokens, over `mmkernels.span_attention`.

    Args:
        embed_dim: width of the queries' sequence and of the result.
        num_heads: heads of the queries.
        kv_dim: width of the sequence that keys and values come from; None: embed_dim.
        num_kv_heads: heads of keys and values, a divisor of num_heads; None: num_heads.
        head_dim: numbers a head; None: embed_dim / num_heads.
        qkv_bias, out_bias: whether the projections have biases (CLIP: both; Qwen2: the former; Llama, mllama: neither).
        qk_norm: normalise queries and keys, head by head, before attention: "rms" (mllama, Qwen3), "layer" (idefics'
            resampler), or None.
        eps: of these norms.
        scale: factor on the scores; None: head_dim ** -0.5.
        softcap: bound on the scores (Gemma 2); None: none.
        device, dtype: of the parameters.

    Parameters: `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `q_norm`, `k_norm` where asked for, named as mllama's, whose
    state_dict loads as it stands. There is no dropout.
    """

    def forward(self, hidden: Tensor, context: Tensor | tuple[Tensor, Tensor], spans: RowSpans) -> Tensor:
        """Args:
            hidden: packed (Tq, embed_dim), or (B, Tq, embed_dim).
            context: packed (Tk, kv_dim), or (B, Tk, kv_dim); or the pair that `keys_values(context)` returned, which a
                decoder computes once for all the tokens it generates.
            spans: which tokens of the context each query sees; without a batch axis they serve every row of the batch.

        Returns: the shape of hidden. A query that sees nothing gets the output projection's bias.
        """
        check_tokens("SpanCrossAttention", "hidden", hidden, self.q_proj.in_features)
        if isinstance(context, tuple):
            k, v = context
        else:
            _check_context(context, hidden, self.k_proj.in_features)
            k, v = self.keys_values(context)
        return self.attend(self.queries(hidden), k, v, spans)


def _check_context(context: Tensor, hidden: Tensor, width: int) -> None:
    check_tokens("SpanCrossAttention", "context", context, width)
    if context.shape[:-2] != hidden.shape[:-2]:
        raise ValueError(
            f"SpanCrossAttention: context has shape {tuple(context.shape)}, hidden {tuple(hidden.shape)}; both must be "
            "packed, or have the same batch axis"
        )


def _check_norms(module: _SpanAttention, source: nn.Module) -> None:
    for name, norm in (("queries", module.q_norm), ("keys", module.k_norm)):
        for parameter in () if norm is None else norm.parameters():
            if parameter.shape != (module.head_dim,):
                raise ValueError(
                    f"{type(module).__name__}: {type(source).__name__} normalises {name} with a parameter of shape "
                    f"{tuple(parameter.shape)}; served are norms of one head, ({module.head_dim},)"
                )


def _check_rotary(hidden: Tensor, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    wanted = (hidden.shape[-2], head_dim)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape[-2:] != wanted or table.dim() > hidden.dim():
            batch = "" if hidden.dim() == 2 else ", the batch axis before it or not"
            raise ValueError(
                f"SpanSelfAttention: {name} of position_embeddings has shape {tuple(table.shape)}; for hidden of shape "
                f"{tuple(hidden.shape)} it must be {wanted}{batch}"
            )
