"""The contrastive losses in plain PyTorch: the definition of right, with the logits spelled out.

With p = I T^T (N x M), s the scale, P_i the positives of image i, its own text where no ids say otherwise, and only
pairs that are not ignored among the logits:

CLIP:    S = s p,  the targets of a row: Y_ij = (1 - e) [j in P_i] / |P_i| + e / M
         loss of image i = -sum_j Y_ij log softmax(S_i)_j        dS_ij = softmax(S_i)_j - Y_ij
         and of the texts the same by columns, 1 / N in place of 1 / M; both means over those that have a positive, and
         the mean of both, or one of them
SigLIP:  S = s p + b,  z = 1 for positives, else -1
         loss = -1/N sum_ij log sigmoid(z_ij S_ij)               dS = -z sigmoid(-z S) / N
and with either: dI = s dS T,  dT = s dS^T I,  ds = sum dS p,  db = sum dS.

What a positive's probability is short of 1, and its logarithm, are what a small loss is made of, and nothing is left of
them beside a 1. They are therefore made of the other entries of the row: with L_ij = s (p_ij - mean of p over P_i),
a_i the log of the sum of exp L_ij over P_i (0 for a single one) and l_i that over the others,

         loss of image i = log(exp a_i + exp l_i) - e mean_j L_ij,   missed_i = sigmoid(l_i - a_i)
         dS_ij = missed_i exp(L_ij - l_i) - e / M                                         of the others
         dS_ij = exp(L_ij - a_i) - 1 / |P_i| - missed_i exp(L_ij - a_i) + e (1 / |P_i| - 1 / M)   of the positives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairing import Pairing, Shares
from .weights import LOWEST


def unsupported(image: Tensor, text: Tensor) -> str | None:
    return None


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, shares: Shares, label_smoothing: float
) -> Tensor:
    rows, columns = _directions(image, text, scale, pairing)
    loss = shares.row * rows.losses(label_smoothing).sum() + shares.column * columns.losses(label_smoothing).sum()
    return (loss / shares.count).to(_wide(image).dtype).reshape(())


def clip_loss_with_grads(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, shares: Shares, label_smoothing: float
) -> tuple[Tensor, ...]:
    rows, columns = _directions(image, text, scale, pairing)
    d_logits = shares.row * rows.d_logits(label_smoothing) + shares.column * columns.d_logits(label_smoothing).T
    d_logits = (d_logits / shares.count).to(_wide(image).dtype)
    loss = clip_loss(image, text, scale, pairing, shares, label_smoothing)
    return loss, *_feature_grads(d_logits, image, text, scale), _scale_grad(d_logits, _products(image, text), scale)


def clip_statistics(
    image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing, rows: Tensor, columns: Tensor
) -> None:
    """Brings statistics (weights.py) of images (3, N) and of texts (3, M) up to date, in place."""
    q = _products(image, text) * torch.where(scale.detach().reshape(()) < 0, -1, 1)
    positives, hidden = pairing.positives(*q.shape, q.device), pairing.hidden(*q.shape, q.device)
    for side, dim, counts in ((rows, 1, pairing.image_counts), (columns, 0, pairing.text_counts)):
        alone = positives if counts is None else positives & (counts == 1).unsqueeze(dim)
        others = q.masked_fill(alone if hidden is None else alone | hidden, LOWEST)
        maximum = torch.maximum(side[0], others.amax(dim))
        fade, factor = side[0] - maximum, _wide(scale).abs().reshape(())
        exponentials = (factor * (others - maximum.unsqueeze(dim))).exp().masked_fill(others == LOWEST, 0)
        side[1] = side[1] * (factor * fade).exp() + exponentials.sum(dim)
        side[2] += q.masked_fill(~positives, 0).sum(dim)
        side[0] = maximum


def clip_gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairing: Pairing,
    rows: Tensor,
    columns: Tensor,
    count: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_image, d_text, d_scale as float64) of the weights (weights.py) of images (4, N) and of texts (4, M)."""
    products = _products(image, text)
    q, factor = products * torch.where(scale.detach().reshape(()) < 0, -1, 1), _wide(scale).abs().reshape(())
    positives, hidden = pairing.positives(*q.shape, q.device), pairing.hidden(*q.shape, q.device)
    d_logits = torch.zeros_like(q)
    for side, dim in ((rows, 1), (columns, 0)):
        maximum, weight, positive_weight, target = (x.unsqueeze(dim) for x in side)
        exponentials = (factor * (q - maximum).clamp(max=0)).exp()  # above 0: a single positive, of no weight
        d_logits += torch.where(positives, exponentials * positive_weight - target, exponentials * weight)
    d_logits = (d_logits if hidden is None else d_logits.masked_fill(hidden, 0)) / count
    d_logits = d_logits.to(q.dtype)
    return *_feature_grads(d_logits, image, text, scale), (d_logits * products).sum(dtype=torch.float64)


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairing: Pairing, count: float) -> Tensor:
    logits = _wide(scale) * _products(image, text) + _wide(bias)
    losses = _counted(-F.logsigmoid(_signs(logits, pairing) * logits), pairing)
    return (losses.sum() / count).reshape(())


def siglip_loss_with_grads(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairing: Pairing, count: float
) -> tuple[Tensor, ...]:
    products = _products(image, text)
    logits = _wide(scale) * products + _wide(bias)
    signs = _signs(logits, pairing)
    d_logits = _counted(-signs * torch.sigmoid(-signs * logits) / count, pairing)
    d_bias = d_logits.sum().to(_wide(bias).dtype).reshape(bias.shape)
    loss = siglip_loss(image, text, scale, bias, pairing, count)
    return loss, *_feature_grads(d_logits, image, text, scale), _scale_grad(d_logits, products, scale), d_bias


def _wide(x: Tensor) -> Tensor:
    """Half types are computed with in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _products(image: Tensor, text: Tensor) -> Tensor:
    return _wide(image) @ _wide(text).T  # (N, M)


def _directions(image: Tensor, text: Tensor, scale: Tensor, pairing: Pairing) -> tuple[_Rows, _Rows]:
    products = _products(image, text)
    positives = pairing.positives(*products.shape, products.device)
    hidden = pairing.hidden(*products.shape, products.device)
    rows = _Rows(products, scale, positives, hidden)
    return rows, _Rows(products.T, scale, positives.T, None if hidden is None else hidden.T)


class _Rows:
    """One direction: the cross-entropy of the rows, of which those without a positive have a loss of 0."""

    def __init__(self, products: Tensor, scale: Tensor, positives: Tensor, hidden: Tensor | None) -> None:
        self.positives, self.hidden = positives, hidden
        self.counts = positives.sum(1, keepdim=True, dtype=products.dtype)
        own = products.masked_fill(~positives, 0).sum(1, keepdim=True) / self.counts.clamp(min=1)
        self.logits = _wide(scale) * (products - own)  # L: the difference of equal products is exactly 0
        others = positives if hidden is None else positives | hidden
        self.of_others = self.logits.masked_fill(others, -torch.inf)
        self.of_positives = self.logits.masked_fill(~positives, -torch.inf)

    def losses(self, label_smoothing: float) -> Tensor:
        losses = torch.logaddexp(self.of_others.logsumexp(1), self.of_positives.logsumexp(1))
        losses = losses - label_smoothing * self.logits.mean(1) if label_smoothing else losses
        return losses.where(self.counts[:, 0] > 0, 0)

    def d_logits(self, label_smoothing: float) -> Tensor:
        missed = (self.of_others.logsumexp(1) - self.of_positives.logsumexp(1)).sigmoid()[:, None]
        ours, others = (torch.softmax(x, 1) for x in (self.of_positives, self.of_others))
        targets = 1 / self.counts
        d_positives = ours - targets - missed * ours + label_smoothing * targets
        d_others = missed * others.masked_fill(self.of_others == -torch.inf, 0)  # NaN where a row has none
        slopes = torch.where(self.positives, d_positives, d_others) - label_smoothing / self.logits.shape[1]
        slopes = slopes if self.hidden is None else slopes.masked_fill(self.hidden, 0)
        return slopes.where(self.counts > 0, 0)


def _signs(logits: Tensor, pairing: Pairing) -> Tensor:
    return 2 * pairing.positives(*logits.shape, logits.device).to(logits.dtype) - 1


def _counted(x: Tensor, pairing: Pairing) -> Tensor:
    hidden = pairing.hidden(*x.shape, x.device)
    return x if hidden is None else x.masked_fill(hidden, 0)


def _feature_grads(d_logits: Tensor, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    d_products = _wide(scale) * d_logits
    return d_products @ _wide(text), d_products.T @ _wide(image)


def _scale_grad(d_logits: Tensor, products: Tensor, scale: Tensor) -> Tensor:
    return (d_logits * products).sum().to(_wide(scale).dtype).reshape(scale.shape)
