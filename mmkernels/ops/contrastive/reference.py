"""The contrastive losses in plain PyTorch: the definition of right, with the logits spelled out.

CLIP:    S = s I T^T,  P = softmax of S over rows, Q over columns,  target Y = (1 - e) eye + e / N
         loss = -1/2N sum_ij Y_ij (log P_ij + log Q_ij)          dS = ((P + Q) / 2 - Y) / N
SigLIP:  S = s I T^T + b,  z = 2 eye - 1
         loss = -1/N sum_ij log sigmoid(z_ij S_ij)               dS = -z sigmoid(-z S) / N
and with either: dI = s dS T,  dT = s dS^T I,  ds = sum dS (I T^T),  db = sum dS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(image: Tensor, text: Tensor) -> str | None:
    return None


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float) -> Tensor:
    logits = _wide(scale) * _products(image, text)
    labels = torch.arange(len(image), device=image.device)
    rows = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    columns = F.cross_entropy(logits.T, labels, label_smoothing=label_smoothing)
    return ((rows + columns) / 2).reshape(())


def clip_loss_with_grads(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float) -> tuple[Tensor, ...]:
    products = _products(image, text)
    logits = _wide(scale) * products
    target = (1 - label_smoothing) * torch.eye(len(image), dtype=logits.dtype, device=logits.device)
    target += label_smoothing / len(image)
    d_logits = ((logits.softmax(1) + logits.softmax(0)) / 2 - target) / len(image)
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
    d_bias = d_logits.sum().to(bias.dtype).reshape(bias.shape)
    loss = siglip_loss(image, text, scale, bias)
    return loss, *_feature_grads(d_logits, image, text, scale), _scale_grad(d_logits, products, scale), d_bias


def _wide(x: Tensor) -> Tensor:
    """Half types are computed with in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _products(image: Tensor, text: Tensor) -> Tensor:
    return _wide(image) @ _wide(text).T  # (N, N)


def _signs(logits: Tensor) -> Tensor:
    return 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1


def _feature_grads(d_logits: Tensor, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    d_products = _wide(scale) * d_logits
    return (d_products @ _wide(text)).to(image.dtype), (d_products.T @ _wide(image)).to(text.dtype)


def _scale_grad(d_logits: Tensor, products: Tensor, scale: Tensor) -> Tensor:
    return (d_logits * products).sum().to(scale.dtype).reshape(scale.shape)
