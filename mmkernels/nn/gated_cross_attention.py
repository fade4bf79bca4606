"""Gated cross-attention blocks, by which Flamingo, idefics and Llama 3.2 Vision let a language model see images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..spans import RowSpans
from ._parts import GatedMLP, RMSNorm, check_dropout, check_takeover, part
from .attention import SpanCrossAttention


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention and an MLP, each added through a tanh gate, to be put between the layers of a language model.

        x = x + tanh(cross_attn_attn_gate) * cross_attn(norm(x), context)
        x = x + tanh(cross_attn_mlp_gate) * mlp(norm(x))

    after Flamingo (Alayrac et al. 2022, https://arxiv.org/abs/2204.14198). Gates start at zero, where the block does
    nothing. The models differ in what becomes of a token that sees no image, and spans and `mlp_mask` say which:

        Flamingo, idefics   spans that are empty for it: attention adds nothing, the MLP still runs
        Llama 3.2 (mllama)  in transformers, spans of all images for it, `empty_rows="all"`, and an mlp_mask that is
                            False there; in Meta's own code, empty spans and the same mlp_mask

    Args:
        embed_dim: width of the text.
        hidden_dim: of the MLP.
        num_heads, kv_dim, num_kv_heads, head_dim, qk_norm: as in `SpanCrossAttention`.
        per_channel_gates: embed_dim gates rather than one for attention and one for the MLP (idefics' "vector").
        eps: of all norms.
        device, dtype: of the parameters.

    Parameters are named as those of mllama's cross-attention layer, whose state_dict loads as it stands. There is no
    dropout.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_heads: int,
        *,
        kv_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: Literal["rms", "layer"] | None = "rms",
        per_channel_gates: bool = False,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        gates = embed_dim if per_channel_gates else 1
        self.input_layernorm = RMSNorm(embed_dim, eps, **options)
        self.cross_attn = SpanCrossAttention(
            embed_dim,
            num_heads,
            kv_dim=kv_dim,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            eps=eps,
            **options,
        )
        self.cross_attn_attn_gate = nn.Parameter(torch.empty(gates, **options))
        self.post_attention_layernorm = RMSNorm(embed_dim, eps, **options)
        self.mlp = GatedMLP(embed_dim, hidden_dim, **options)
        self.cross_attn_mlp_gate = nn.Parameter(torch.empty(gates, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Closed gates; the layers inside have their own."""
        nn.init.zeros_(self.cross_attn_attn_gate)
        nn.init.zeros_(self.cross_attn_mlp_gate)

    @classmethod
    def from_transformers(cls, layer: nn.Module) -> GatedCrossAttentionBlock:
        """The same block on the very submodules of IdeficsGatedCrossAttentionLayer or MllamaCrossAttentionDecoderLayer.

        Raises TypeError or ValueError where a part is missing, or has no place here, such as dropout.
        """
        name = cls.__name__
        check_dropout(name, layer, "config")  # under which name idefics' layer keeps its rate
        module = cls(1, 1, 1, device="meta")
        module.cross_attn = SpanCrossAttention.from_transformers(part(name, layer, "cross_attn"))
        module.input_layernorm = part(name, layer, "input_layernorm")
        module.post_attention_layernorm = part(name, layer, "post_attention_layernorm")
        module.mlp = part(name, layer, "mlp")
        module.cross_attn_attn_gate = part(name, layer, "cross_attn_attn_gate", "alpha_cross_attn")
        module.cross_attn_mlp_gate = part(name, layer, "cross_attn_mlp_gate", "alpha_dense")
        check_takeover(module, layer, but=("rotary_emb", "act_cross_attn", "act_dense"))  # the latter two are tanh
        return module.train(layer.training)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor | tuple[Tensor, Tensor],
        spans: RowSpans,
        mlp_mask: Tensor | None = None,
    ) -> Tensor:
        """Args:
            hidden: text, packed (Tq, embed_dim), or (B, Tq, embed_dim).
            context: image tokens, packed (Tk, kv_dim), or (B, Tk, kv_dim); or `cross_attn.keys_values` of them.
            spans: which image tokens each text token sees; `RowSpans.media` makes them.
            mlp_mask: bool (Tq,) or (B, Tq), False where the MLP adds nothing; None: nowhere.

        Returns: the shape of hidden.
        """
        if mlp_mask is not None and (mlp_mask.dtype != torch.bool or mlp_mask.shape != hidden.shape[:-1]):
            raise ValueError(
                f"GatedCrossAttentionBlock: mlp_mask is {mlp_mask.dtype} of shape {tuple(mlp_mask.shape)}; it must be "
                f"bool of shape {tuple(hidden.shape[:-1])}"
            )
        attended = self.cross_attn(self.input_layernorm(hidden), context, spans)
        hidden = hidden + _gate(self.cross_attn_attn_gate) * attended
        added = self.mlp(self.post_attention_layernorm(hidden))
        if mlp_mask is not None:
            added = added.masked_fill(~mlp_mask[..., None], 0.0)
        return hidden + _gate(self.cross_attn_mlp_gate) * added

    def extra_repr(self) -> str:
        return f"gates={self.cross_attn_attn_gate.numel()}"


def _gate(parameter: Tensor) -> Tensor:
    """(1,) or (embed_dim,), whatever further axes of one it is stored with, so that packed text keeps its shape."""
    return parameter.tanh().flatten()
