"""Attention sinks: plain PyTorch behind the kernels of any backend, and autograd through it.

A head's sink s is the logit of one more key, which every query sees and whose value is zero. With lse_i of the keys
alone, as the kernels give it:

    share_i = sigmoid(lse_i - s),   out'_i = share_i out_i,   lse'_i = log(exp(lse_i) + exp(s))

and lse takes part in the result, so that the kernels are fed with its gradient, share_i (1 - share_i) dO'_i . out_i.

Memory moved beside the kernels': out and its gradient once more, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PART = 1024  # queries that the gradient of the only head's sink is summed over at a time


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out: (B, T, H, Dv), lse: (B, H, T), sinks: (H,) -> the two with sinks.

    A query that sees no key gives zeros and an lse of its sink; what the gradient of these zeros holds reaches nothing.
    """
    sinks = _by_query(sinks.to(lse.dtype), lse.shape[-1])
    idle = lse == -torch.inf
    lse = lse.masked_fill(idle, 0.0)
    share = logsigmoid(lse - sinks).exp().masked_fill(idle, 0.0)  # sigmoid's derivative loses the last of 1 - share
    out = (out * share.mT[..., None]).to(out.dtype)
    return out, torch.where(idle, sinks, torch.logaddexp(lse, sinks)) if want_lse else None


def _by_query(sinks: Tensor, queries: int) -> Tensor:
    """(H, 1), or of one head (1, queries): torch cuts a long sum to a single number between its threads, how many there
    are would show in the gradient's bits, and therefore it is summed in parts."""
    if sinks.shape[0] > 1:
        return sinks[:, None]
    parts = -(-queries // PART)
    return sinks.expand(parts, 1).expand(parts, PART).flatten()[None, :queries]
