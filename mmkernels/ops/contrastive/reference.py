"""The contrastive losses in plain PyTorch: the definition of right, with the logits spelled out.

CLIP:    S = s I T^T,  P = softmax of S over rows, Q over columns,  target Y = (1 - e) eye + e / N
         loss = -1/2N sum_ij Y_ij (log P_ij + log Q_ij)          dS = ((P + Q) / 2 - Y) / N
SigLIP:  S = s I T^T + b,  z = 2 eye - 1
         loss = -1/N sum_ij log sigmoid(z_ij S_ij)               dS = -z sigmoid(-z S) / N
and with either: dI = s dS T,  dT = s dS^T I,  ds = sum dS (I T^T),  db = sum dS.

1 - P_ii and log P_ii are what a small loss is made of, and nothing is left of them beside a 1. They are therefore made
of the other entries of the row: with L_ij = s (p_ij - p_ii), p = I T^T, and l_i the log of sum exp L_ij over j other
than i,

         -log P_ii = log(1 + exp l_i),   1 - P_ii = sigmoid(l_i),   P_ij = sigmoid(l_i) exp(L_ij - l_i).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(image: Tensor, text: Tensor) -> str | None:
    return None


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float) -> Tensor:
    products = _products(image, text)
    rows, columns = (_own_logits(x, scale) for x in (products, products.T))
    return ((_cross_entropy(rows, label_smoothing) + _cross_entropy(columns, label_smoothing)) / 2).reshape(())


def clip_loss_with_grads(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    products = _products(image, text)
    rows, columns = (_own_logits(x, scale) for x in (products, products.T))
    d_logits = (_errors(rows) + _errors(columns).T) / 2
    d_logits += label_smoothing * (_eye(d_logits) - 1 / len(image))
    d_logits /= len(image)
    loss = clip_loss(image, text, scale, label_smoothing)
    return loss, *_feature_grads(d_logits, image, text, scale), _scale_grad(d_logits, products, scale)


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = _wide(scale) * _products(image, text) + _wide(bias)
    return (-F.logsigmoid(_signs(logits) * logits).sum() / len(image)).reshape(())


def siglip_loss_with_grads(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    products = _products(image, text)
    logits = _wide(scale) * products + _wide(bias)
    signs = _signs(logits)
    d_logits = -signs * torch.sigmoid(-signs * logits) / len(image)
    d_bias = d_logits.sum().to(_wide(bias).dtype).reshape(bias.shape)
    loss = siglip_loss(image, text, scale, bias)
    return loss, *_feature_grads(d_logits, image, text, scale), _scale_grad(d_logits, products, scale), d_bias


def _wide(x: Tensor) -> Tensor:
    """Half types are computed with in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _products(image: Tensor, text: Tensor) -> Tensor:
    return _wide(image) @ _wide(text).T  # (N, N)


def _eye(logits: Tensor) -> Tensor:
    return torch.eye(len(logits), dtype=logits.dtype, device=logits.device)


def _own_logits(products: Tensor, scale: Tensor) -> Tensor:
    """L: logits less the one of the row's own pair, the difference taken first: that of equal products is exactly 0,
    and the diagonal 0 or NaN."""
    return _wide(scale) * (products - products.diagonal()[:, None])


def _others(logits: Tensor) -> Tensor:
    return logits.masked_fill(_eye(logits).bool(), -torch.inf)


def _cross_entropy(logits: Tensor, label_smoothing: float) -> Tensor:
    """Of the rows of `_own_logits`, with their own pairs as targets."""
    loss = torch.logaddexp(_others(logits).logsumexp(1), logits.diagonal()).mean()
    return loss - label_smoothing * logits.mean() if label_smoothing else loss


def _errors(logits: Tensor) -> Tensor:
    """The softmax of each row of `_own_logits`, less 1 on the diagonal."""
    others = _others(logits)
    missed = (others.logsumexp(1) - logits.diagonal()).sigmoid()
    shares = others.softmax(1).masked_fill(_eye(logits).bool(), 0)  # a single pair has no others, and NaN for a share
    return missed[:, None] * (shares - _eye(logits))


def _signs(logits: Tensor) -> Tensor:
    return 2 * _eye(logits) - 1


def _feature_grads(d_logits: Tensor, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    d_products = _wide(scale) * d_logits
    return d_products @ _wide(text), d_products.T @ _wide(image)


def _scale_grad(d_logits: Tensor, products: Tensor, scale: Tensor) -> Tensor:
    return (d_logits * products).sum().to(_wide(scale).dtype).reshape(scale.shape)
