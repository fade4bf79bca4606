"""The Perceiver resampler: from any number of image tokens to a fixed number of latents."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from ..spans import RowSpans
from ._parts import GatedMLP, RMSNorm, check_takeover, check_tokens, part
from .attention import SpanCrossAttention


class PerceiverResampler(nn.Module):
    """Learned latents that attend to the tokens of an image and to themselves, layer by layer, and replace them.

    Flamingo's resampler (Alayrac et al. 2022, https://arxiv.org/abs/2204.14198). A layer:

        latents = latents + attention(queries: norm(latents), keys and values: norm'(context) and norm(latents))
        latents = latents + mlp(norm''(latents))

    Args:
        embed_dim: width of image tokens and latents.
        depth: number of layers.
        num_heads, head_dim, num_kv_heads: as in `SpanCrossAttention`.
        num_latents: latents an image.
        hidden_dim: of the MLPs; None: 4 embed_dim.
        form: "idefics" has layer norms and MLPs with a ReLU; "idefics2" has RMS norms and gated MLPs (SwiGLU).
        qk_norm: normalise queries and keys too ("idefics": by layer norms).
        eps: of all norms; None: 1e-5 for layer norms, 1e-6 for RMS norms.
        device, dtype: of the parameters.

    Parameters are named as those of idefics2's resampler, whose state_dict loads as it stands. There is no dropout.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        num_latents: int,
        *,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        form: Literal["idefics", "idefics2"] = "idefics2",
        qk_norm: bool = False,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if form not in ("idefics", "idefics2"):
            raise ValueError(f"PerceiverResampler: form is {form!r}; accepted are 'idefics' and 'idefics2'")
        kind, norm = ("layer", nn.LayerNorm) if form == "idefics" else ("rms", RMSNorm)
        eps = eps if eps is not None else 1e-5 if form == "idefics" else 1e-6
        options = {"device": device, "dtype": dtype}
        self.latents = nn.Parameter(torch.empty(num_latents, embed_dim, **options))
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = SpanCrossAttention(
                embed_dim,
                num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                qk_norm=kind if qk_norm else None,
                eps=eps,
                **options,
            )
            norms = [norm(embed_dim, eps, **options) for _ in range(3)]
            mlp = GatedMLP if form == "idefics2" else _relu_mlp
            self.layers.append(_Layer(attention, *norms, mlp(embed_dim, hidden_dim or 4 * embed_dim, **options)))
        self.norm = norm(embed_dim, eps, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Latents drawn from a normal distribution, as in idefics; the layers inside have their own."""
        nn.init.normal_(self.latents)

    @classmethod
    def from_transformers(cls, resampler: nn.Module) -> PerceiverResampler:
        """The same resampler on the very submodules of IdeficsPerceiverResampler or Idefics2PerceiverResampler.

        Raises TypeError or ValueError where a part is missing, or has no place here, such as dropout.
        """
        name = cls.__name__
        module = cls(1, 0, 1, 1, 1, device="meta")
        module.latents = part(name, resampler, "latents")
        module.norm = part(name, resampler, "norm", "layer_norm")
        if hasattr(resampler, "blocks"):
            module.layers.extend(_Layer.from_idefics(*block) for block in resampler.blocks)
        else:
            module.layers.extend(map(_Layer.from_idefics2, part(name, resampler, "layers")))
        check_takeover(module, resampler)
        return module.train(resampler.training)

    def forward(self, context: Tensor, spans: RowSpans | None = None) -> Tensor:
        """Args:
            context: image tokens: (B, T, embed_dim), an image a row; or the images packed, (T, embed_dim).
            spans: which tokens of the context each latent sees, where that is not all of its row: for packed images
                RowSpans over images * num_latents queries, an image's latents side by side; for padded ones over
                num_latents, with a batch axis. Its own image's latents each latent sees in any case.

        Returns: (B, num_latents, embed_dim), or packed like the images, (images * num_latents, embed_dim).
        """
        check_tokens("PerceiverResampler", "context", context, self.latents.shape[1])
        num_latents, tokens = self.latents.shape[0], context.shape[-2]
        if spans is None:
            images, spans = 1, RowSpans.full(num_latents, tokens + num_latents, device=context.device)
        else:
            images, spans = self._check(spans, context), _with_latents(spans, num_latents)
        batched = context.dim() == 3
        latents = self.latents.expand(len(context), -1, -1) if batched else self.latents.repeat(images, 1)
        for layer in self.layers:
            latents = layer(latents, context, spans)
        return self.norm(latents)

    def _check(self, spans: RowSpans, context: Tensor) -> int:
        """The number of images that these spans give latents to, in a row of the batch."""
        num_latents, tokens = self.latents.shape[0], context.shape[-2]
        images = spans.num_queries // num_latents
        if (
            images * num_latents != spans.num_queries
            or (context.dim() == 3 and images != 1)
            or spans.num_keys != tokens
        ):
            wanted = f"{num_latents}" if context.dim() == 3 else f"a multiple of {num_latents}"
            raise ValueError(
                f"PerceiverResampler: spans are for {spans.num_queries} queries and {spans.num_keys} keys; for context "
                f"of shape {tuple(context.shape)} they must be for {wanted} and {tokens}"
            )
        return images

    def extra_repr(self) -> str:
        return f"num_latents={self.latents.shape[0]}, embed_dim={self.latents.shape[1]}"


class _Layer(nn.Module):
    def __init__(
        self,
        attention: SpanCrossAttention,
        input_latents_norm: nn.Module,
        input_context_norm: nn.Module,
        post_attention_layernorm: nn.Module,
        mlp: nn.Module,
    ) -> None:
        super().__init__()
        self.input_latents_norm = input_latents_norm
        self.input_context_norm = input_context_norm
        self.self_attn = attention
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    @classmethod
    def from_idefics(cls, attention: nn.Module, feed_forward: nn.Module) -> _Layer:
        """IdeficsPerceiverAttention holds the norms before it, IdeficsMLP that before itself."""
        mlp = _named(feed_forward.fc, feed_forward.act, feed_forward.c_proj)
        own = SpanCrossAttention._on_parts_of(attention)
        return cls(own, attention.latents_layer_norm, attention.context_layer_norm, feed_forward.ln, mlp)

    @classmethod
    def from_idefics2(cls, layer: nn.Module) -> _Layer:
        norms = layer.input_latents_norm, layer.input_context_norm, layer.post_attention_layernorm
        return cls(SpanCrossAttention.from_transformers(layer.self_attn), *norms, layer.mlp)

    def forward(self, latents: Tensor, context: Tensor, spans: RowSpans) -> Tensor:
        """Packed or with a batch axis; the spans' keys are those of the context, then those of all latents."""
        queries = self.input_latents_norm(latents)
        seen = torch.cat((self.input_context_norm(context), queries), -2)
        latents = latents + self.self_attn(queries, seen, spans)
        return latents + self.mlp(self.post_attention_layernorm(latents))


def _relu_mlp(embed_dim: int, hidden_dim: int, **options) -> nn.Module:
    up = nn.Linear(embed_dim, hidden_dim, bias=False, **options)
    return _named(up, nn.ReLU(), nn.Linear(hidden_dim, embed_dim, bias=False, **options))


def _named(up: nn.Module, act: nn.Module, down: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc=up, act=act, c_proj=down))


def _with_latents(spans: RowSpans, num_latents: int) -> RowSpans:
    """Each query sees, after its keys, the latents of its image too, which stand behind all keys. The keys' spans are
    cut at the last key first: beyond it, they would mean latents."""
    lo, hi = (x.clamp(max=spans.num_keys) for x in (spans.lo, spans.hi))
    if lo.dim() == 1:
        lo, hi = lo[None], hi[None]
    latent = torch.arange(spans.num_queries, dtype=torch.int32, device=lo.device)
    first = (latent - latent % num_latents + spans.num_keys).expand(*lo.shape[:-2], 1, -1)
    return RowSpans(
        torch.cat((lo, first), -2), torch.cat((hi, first + num_latents), -2), spans.num_keys + spans.num_queries
    )
