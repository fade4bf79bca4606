"""From the statistics of rows of logits (or of columns) to their losses and their part of dS, in float64.

What csrc/cpu/contrastive/weights.h and the kernels for a GPU compute for one process; this is for several, whose
statistics are put together first. Statistics are (3, N): the maximum of q (the products times the sign of the scale)
and the sum of exp(S - its logit), both without the one positive of a row, and the sum of q over the positives. Weights
are (4, N): that maximum m, and w, v and t, with which dS = w exp(S - m), and of positives v exp(S - m) - t.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -3.4e38  # the maximum of no logits


def no_statistics(count: int, like: Tensor) -> Tensor:
    """Of `count` rows that have met no column yet."""
    statistics = like.new_zeros(3, count, dtype=torch.promote_types(like.dtype, torch.float32))
    statistics[0] = LOWEST
    return statistics


def weigh(
    statistics: Tensor, counts: Tensor, scale: Tensor, share: float | Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """(losses, weights), losses (N,) in float64, without what label smoothing takes off all pairs alike.

    counts: (N,), how many positives each has; the losses and weights of those that have none are 0.
    """
    x, r, positive = statistics.double()
    factor = scale.detach().double().abs().reshape(())
    counts = counts.double()
    mean = positive / counts.clamp(min=1)
    lead = factor * (mean - x)
    leads = lead >= 0  # not if NaN
    fade = torch.where(leads, (-lead).exp(), 1.0)
    rest = r * fade
    total = torch.where(leads, 1.0, lead.exp()) + rest
    several = counts > 1
    loss = torch.where(leads, rest.log1p(), total.log() - lead)
    loss = torch.where(several, r.log() - lead, loss)
    weight = torch.where(several, 1 / r, fade / total)
    target = torch.where(several, (1 - label_smoothing) / counts.clamp(min=1), rest / total - label_smoothing)
    weights = torch.stack([x, share * weight, share * weight * several, share * target])
    counted = counts > 0
    weights[1:] = weights[1:].where(counted, 0)
    losses = share * (loss + label_smoothing * factor * mean)
    return losses.where(counted, 0), weights.to(statistics.dtype)
