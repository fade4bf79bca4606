"""Span attention in plain PyTorch: the definition of right.

    S = scale q k^T, then softcap tanh(S / softcap) where there is one
    P_ij = exp(S_ij - lse_i) for the keys j that query i sees, lse_i = log sum_j exp(S_ij), O = P V
    delta_i = sum_d dO_id O_id - dlse_i,  dS = P (dO V^T - delta)  [times 1 - (S / softcap)^2],  dQ = scale dS K,
    dK = scale dS^T Q,  dV = P^T dO

A query that sees nothing: O = 0, lse = -inf, and no gradient. What it does not see reaches it in no way: a plain
product would not do, since 0 * NaN is NaN (`_visible_product`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .params import Params


def unsupported(q: Tensor, k: Tensor, v: Tensor, params: Params | None = None) -> str | None:
    return None


def span_attention(q: Tensor, k: Tensor, v: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """q: (B, Tq, Hq, D), k: (B, Tk, Hkv, D), v: (B, Tk, Hkv, Dv) -> (B, Tq, Hq, Dv) and lse (B, Hq, Tq)."""
    mask = _mask(params, k.shape[1])
    scores = _scores(q, k, mask, params)[0]
    lse = scores.logsumexp(-1)
    out = _visible_product(_weights(scores), _by_heads(v, q), mask)
    return _by_tokens(out).to(q.dtype), lse


def span_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None,
    params: Params,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each of its shape and dtype, contiguous. d_lse, as lse; None: zeros."""
    mask = _mask(params, k.shape[1])
    scores, d_cap = _scores(q, k, mask, params)
    weights = _weights(scores)
    queries, keys, values, d_o, o = (_by_heads(x, q) for x in (q, k, v, d_out, out))
    d_weights = d_o @ values.mT
    delta = (d_o * o).sum(-1, keepdim=True)
    if d_lse is not None:
        delta = delta - d_lse[..., None]
    d_scores = weights * (d_weights - delta) * d_cap * params.scale
    d_scores = d_scores.masked_fill(~mask, 0.0)
    d_q = _visible_product(d_scores, keys, mask)
    d_k = _visible_product(d_scores.mT, queries, mask.mT)
    d_v = _visible_product(weights.mT, d_o, mask.mT)
    return _by_tokens(d_q).to(q.dtype), _sum_groups(d_k, k).to(k.dtype), _sum_groups(d_v, v).to(v.dtype)


def span_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    params: Params,
) -> tuple[Tensor, Tensor]:
    """The derivatives of out and lse along t_q, t_k and t_v (None: zeros): the forward mode of every backend.

    With t_S the derivative of S: t_lse = sum_j P_ij t_S_ij, t_O = (P (t_S - t_lse)) V + P t_V."""
    mask = _mask(params, k.shape[1])
    scores, d_cap = _scores(q, k, mask, params)
    weights, queries, keys = _weights(scores), _by_heads(q, q), _by_heads(k, q)
    t_scores = torch.zeros_like(scores)
    if t_q is not None:
        t_scores = t_scores + _by_heads(t_q, q) @ keys.mT
    if t_k is not None:
        t_scores = t_scores + queries @ _by_heads(t_k, q).mT
    t_scores = (t_scores * d_cap * params.scale).masked_fill(~mask, 0.0)
    t_lse = (weights * t_scores).sum(-1)
    t_out = _visible_product(weights * (t_scores - t_lse[..., None]), _by_heads(v, q), mask)
    if t_v is not None:
        t_out = t_out + _visible_product(weights, _by_heads(t_v, q), mask)
    return _by_tokens(t_out).to(q.dtype), t_lse


def _mask(params: Params, num_keys: int) -> Tensor:
    """(B or 1, 1, Tq, Tk), True where a query sees a key."""
    keys = torch.arange(num_keys, device=params.lo.device)
    return ((params.lo[..., None] <= keys) & (keys < params.hi[..., None])).any(1)[:, None]


def _by_heads(x: Tensor, q: Tensor) -> Tensor:
    """(B, T, H, D) -> (B, Hq, T, D), float32 at least: a key head is repeated for the query heads that share it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide).transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], 1)


def _by_tokens(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    """(B, Hq, T, D) -> (B, T, Hkv, D)."""
    return _by_tokens(grad.unflatten(1, (like.shape[2], -1)).sum(2))


def _scores(q: Tensor, k: Tensor, mask: Tensor, params: Params) -> tuple[Tensor, Tensor | float]:
    """(B, Hq, Tq, Tk), -inf where a query does not see a key, and their derivative by the scaled product."""
    scores, derivative = _by_heads(q, q) @ _by_heads(k, q).mT * params.scale, 1.0
    if params.softcap:
        bounded = (scores / params.softcap).tanh()
        scores, derivative = params.softcap * bounded, 1 - bounded * bounded
    return scores.masked_fill(~mask, -torch.inf), derivative


def _weights(scores: Tensor) -> Tensor:
    """P, whose rows sum to one however coarsely lse is rounded: a part in 10^5 where scores are about 200."""
    return scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)


def _visible_product(weights: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """weights @ x, in which a row of x that is not finite reaches the rows of the result that see it, and no others."""
    finite = x.isfinite().all(-1)
    clean = weights.nan_to_num() @ x.masked_fill(~finite[..., None], 0.0)
    spoilt = (mask & ~finite[..., None, :]).any(-1) | (mask & ~weights.isfinite()).any(-1)
    return clean.masked_fill(spoilt[..., None], torch.nan)
